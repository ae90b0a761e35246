"""The one builder of device meshes, and the names of its axes that techniques ask for."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchtitan_lite.distributed.parallel_dims import ParallelDims


def build_mesh(dims: ParallelDims, device_type: str) -> DeviceMesh:
    """A mesh over all ranks with the named axes of `dims` that are longer than one.

    Data parallelism needs an axis to attach to, and torch's replication by FSDP2 one to shard over: dp_shard is
    there even when it is 1. Needs a process group whose world size is dims.world_size.
    """
    degrees = {axis: degree for axis, degree in dims.degrees.items() if degree > 1 or axis == "dp_shard"}
    return init_device_mesh(device_type, tuple(degrees.values()), mesh_dim_names=tuple(degrees))


def axis(mesh: DeviceMesh, name: str) -> DeviceMesh | None:
    """The part of `mesh` along one axis; None where that axis is 1 long and so not in it."""
    return mesh[name] if name in (mesh.mesh_dim_names or ()) else None


def data_axes(mesh: DeviceMesh) -> DeviceMesh:
    """The axes over which parameters are replicated and sharded: (dp_replicate), then dp_shard with cp.

    Ranks that share a sequence hold the same parameters, and their gradients are sums over parts of it: for FSDP
    they are more shards.
    """
    names = mesh.mesh_dim_names or ()
    if "cp" not in names:
        return mesh["dp_replicate", "dp_shard"] if "dp_replicate" in names else mesh["dp_shard"]
    shards = mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
    return DeviceMesh._concatenate([mesh["dp_replicate"], shards]) if "dp_replicate" in names else shards
