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
    return _replicated(mesh, _joined(mesh, ("dp_shard", "cp"), "dp_shard_cp"))


def sequence_axes(mesh: DeviceMesh) -> DeviceMesh | None:
    """cp with tp, over which the tokens of a sample are spread; None where each rank has whole samples."""
    names = [name for name in ("cp", "tp") if axis(mesh, name) is not None]
    return _joined(mesh, ("cp", "tp"), "cp_tp") if names else None


def expert_axes(mesh: DeviceMesh, ep: int) -> tuple[DeviceMesh, DeviceMesh | None]:
    """The axes over which experts are replicated and sharded, (dp_replicate) then efsdp, and the one over which they
    are shared out, ep; None where ep is 1.

    All ranks that hold other tokens are the experts' ranks: dp_shard, cp and tp. ep takes neighbours, whose links are
    the fastest: tokens travel in every layer, twice.
    """
    ranks = _joined(mesh, ("dp_shard", "cp", "tp"), "dp_shard_cp_tp")
    if ep == 1:
        return _replicated(mesh, ranks), None
    both = ranks._unflatten(0, (ranks.size() // ep, ep), ("efsdp", "ep"))
    return _replicated(mesh, both["efsdp"]), both["ep"]


def _joined(mesh: DeviceMesh, names: tuple[str, ...], joined: str) -> DeviceMesh:
    """The axes of these names that `mesh` has, as one."""
    there = tuple(name for name in names if axis(mesh, name) is not None)
    return mesh[there]._flatten(joined) if len(there) > 1 else mesh[there[0]]


def _replicated(mesh: DeviceMesh, shards: DeviceMesh) -> DeviceMesh:
    replicas = axis(mesh, "dp_replicate")
    return shards if replicas is None else DeviceMesh._concatenate([replicas, shards])
