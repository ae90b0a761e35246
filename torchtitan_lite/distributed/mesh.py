"""The one builder of device meshes."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchtitan_lite.distributed.parallel_dims import ParallelDims


def build_mesh(dims: ParallelDims, device_type: str) -> DeviceMesh:
    """A mesh over all ranks with the named axes of `dims` that are longer than one.

    Data parallelism needs an axis to attach to, and torch's replication by FSDP2 one to shard over: dp_shard is
    there even when it is 1. Needs a process group whose world size is dims.world_size.
    """
    degrees = {axis: degree for axis, degree in dims.degrees.items() if degree > 1 or axis == "dp_shard"}
    return init_device_mesh(device_type, tuple(degrees.values()), mesh_dim_names=tuple(degrees))
