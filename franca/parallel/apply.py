"""Single-device model code onto many devices: one function, one order.

float8 -> TP and CP -> recomputation -> compile per block -> FSDP2 -> memory -> weights.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from franca.core.config import Precision
from franca.models.base import Model, owners
from franca.parallel import float8 as eight_bits
from franca.parallel import world
from franca.parallel.float8 import Float8Config
from franca.parallel.mesh import Mesh, ParallelConfig
from franca.parallel.pipeline import Pipeline, cut, split
from franca.parallel.tensor import Spread, split_layers

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build(
    make: Callable[[], nn.Module],
    mesh: Mesh,
    parallel: ParallelConfig,
    precision: Precision,
    device: torch.device,
    seed: int,
    float8: Float8Config | None,
    seq_len: int,
) -> nn.Module:
    """What `make` gives, a model on the meta device, on its devices (see `parallelize`); of several stages, this rank's."""
    stages = mesh.axis("pp")
    if stages is None:
        model = make()
        parallelize(model, mesh, parallel, precision, device, seed, float8)
        return model
    whole: Any = make()
    parts = split(whole.layer_flops(seq_len), whole.head_flops, mesh.sizes["pp"] * parallel.interleave, parallel.stages)
    chunks = []
    for layers in parts[mesh.here["pp"] :: mesh.sizes["pp"]]:
        chunks.append(make())
        cut(chunks[-1], layers)
        parallelize(chunks[-1], mesh, parallel, precision, device, seed, float8)
    return Pipeline(chunks, stages.get_group(), device, seq_len // mesh.sizes["cp"] // mesh.sizes["tp"])


def parallelize(
    model: nn.Module,
    mesh: Mesh,
    parallel: ParallelConfig,
    precision: Precision,
    device: torch.device,
    seed: int,
    float8: Float8Config | None = None,
) -> None:
    """Lay a model, built on the meta device, onto its devices, in place, with its initial weights.

    Parameters stay fp32 and gradients are reduced in fp32; `precision` is that of the products. The initial weights
    depend on the seed and the device type, not on the mesh.
    """
    contract: Model = model  # type: ignore[assignment]
    contract.compute_dtype = dtype = DTYPES[precision]
    if parallel.compile:
        world.keep_compiled(parallel.compile_cache)
        torch._dynamo.config.recompile_limit = 64  # all blocks share one code: kinds x (train, eval) x sizes of micro-batches
    if float8 is not None:
        eight_bits.convert(model, float8, device)
    tp, cp, fsdp = mesh.axis("tp"), mesh.rows, mesh.fsdp
    if tp is not None:
        split_layers(model, contract.config.tp_plan(), tp)
    if cp is not None:
        contract.spread = Spread(cp)
    parallel.recompute.apply(contract.layers)
    if parallel.compile:
        for layer in contract.layers:
            layer.compile()
    if fsdp is not None:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in contract.layers:
            fully_shard(layer, mesh=fsdp, mp_policy=policy, reshard_after_forward=parallel.reshard_after_forward)
        fully_shard(model, mesh=fsdp, mp_policy=policy)
        for method in ("losses", "hidden"):
            register_fsdp_forward_method(model, method)
    model.to_empty(device=device)
    init_weights(model, torch.Generator(device).manual_seed(seed))


def reshard(model: nn.Module) -> None:
    """A forward pass without a backward one leaves FSDP's parameters whole: cut them again before anyone reads them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def init_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Set every parameter and buffer: each module's full weights are drawn once, and this rank's part of them is kept.

    Never more than one module is whole, and every mesh gets the same numbers: they follow from the generator's seed
    and the module's name.
    """
    seed, device = generator.initial_seed(), generator.device
    for owner, module in owners(model):
        generator.manual_seed(random.Random(f"{seed} {owner}").getrandbits(63))
        sharded = {name: p for name, p in module.named_parameters(recurse=False) if isinstance(p, DTensor)}
        whole = {name: nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=device)) for name, p in sharded.items()}
        module._parameters.update(whole)
        module.reset(generator)
        module._parameters.update(sharded)
        for name, p in sharded.items():
            p.to_local().copy_(_part(whole[name].detach(), p))


def _part(whole: Tensor, sharded: DTensor) -> Tensor:
    """This rank's part of a tensor: cut along the inner axes of the mesh first, as FSDP2 cuts what others have cut before."""
    part, here = whole, sharded.device_mesh.get_coordinate()
    assert here is not None
    for axis in reversed(range(sharded.device_mesh.ndim)):
        dim = getattr(sharded.placements[axis], "dim", None)  # of Shard and of FSDP2's _StridedShard, which is none
        if dim is not None:
            chunks = part.chunk(sharded.device_mesh.size(axis), dim)
            part = chunks[here[axis]] if here[axis] < len(chunks) else part.narrow(dim, 0, 0)
    return part
