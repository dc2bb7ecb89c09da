"""The optimizer: megatron-core's AdamW (distributed or not), gradient clipping, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core import tensor_parallel
from megatron.core import utils as megatron_utils
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from nemo_steerlm.config import OptimizerConfig
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.megatron import optimizer_state, patches, token_adapter
from nemo_steerlm.megatron.phases import Phases


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """The learning rate of optimizer step `step` (0-based): linear warm-up, then constant or a cosine to `min_lr`.

    A pure function of the step, so that resuming needs no scheduler state.
    """
    assert config.lr is not None, "set by train.start"
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))


def schedule(optimizer: Any, config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Set every parameter group's learning rate and weight decay for optimizer step `step`; returns the rate.

    megatron-core marks norms and biases with `wd_mult` 0, which the training loop must apply.
    """
    rate = learning_rate(config, step, max_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = config.weight_decay * group.get("wd_mult", 1.0)
    return rate


def wrap(chunks: list[Any], config: OptimizerConfig, phases: Phases | None = None) -> list[DistributedDataParallel]:
    """Put each model chunk into megatron-core's data-parallel wrapper, which owns the gradient buffers (fp32).

    Args:
        phases: measures the reduction of gradients as "reduction".
    """
    transformer = chunks[0].config
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.distributed,
        overlap_grad_reduce=config.overlap,
        overlap_param_gather=config.overlap and config.distributed,
    )
    wrapped = [DistributedDataParallel(transformer, ddp, chunk) for chunk in chunks]
    _fuse_weight_gradients(chunks)
    transformer.finalize_model_grads_func = _finalising(phases or Phases())
    no_sync = [model.no_sync for model in wrapped]
    transformer.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    if config.overlap:
        for name, method in (("grad_sync_func", "start_grad_sync"), ("param_sync_func", "start_param_sync")):
            functions = [getattr(model, method) for model in wrapped]
            setattr(transformer, name, functions if len(functions) > 1 else functions[0])
    return wrapped


def _finalising(phases: Phases) -> Callable[..., None]:
    def finalise(chunks: list[Any], *args: Any, **kwargs: Any) -> None:
        """megatron-core's own, and the gradients it does not know."""
        with phases("reduction"):
            finalize_model_grads(chunks, *args, **kwargs)
            token_adapter.sum_copies(chunks)

    return finalise


def _fuse_weight_gradients(chunks: list[Any]) -> None:
    """Let linears add a weight's gradient to its buffer inside the product, where a library has that kernel.

    Transformer Engine's linears have their own kernel. megatron-core's use apex's, and cannot be built for it without
    apex; they share one configuration key, so that each module is set here instead.
    """
    apex = torch.cuda.is_available() and getattr(tensor_parallel.layers, "_grad_accum_fusion_available", False)
    for module in (module for chunk in chunks for module in chunk.modules()):
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
        if apex and hasattr(module, "gradient_accumulation_fusion"):
            module.gradient_accumulation_fusion = True


def gather(chunks: list[DistributedDataParallel]) -> None:
    """Give every data-parallel rank all current weights.

    With `overlap` the distributed optimizer leaves that to the next forward: until then a rank holds the previous
    step's weights outside of its own share, which must not be saved or averaged.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def build(chunks: list[DistributedDataParallel], config: OptimizerConfig) -> Any:
    """megatron-core's optimizer over all chunks: AdamW, no weight decay on norms and biases, global-norm clipping.

    Raises:
        ConfigError: without `distributed`, a bf16 backbone has a head in fp32.
    """
    transformer = chunks[0].config
    if not config.distributed and len({p.dtype for chunk in chunks for p in chunk.parameters()}) > 1:
        raise ConfigError(
            "optimizer.distributed=false: megatron-core cannot save its state for a bf16 backbone with an fp32 head; "
            "use optimizer.distributed=true, or trainer.precision=fp32"
        )
    _repair_resume()
    _repair_norm()
    optimizer = megatron_optimizer.get_megatron_optimizer(
        megatron_optimizer.OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=transformer.bf16,
            params_dtype=transformer.params_dtype,
            use_distributed_optimizer=config.distributed,
            overlap_param_gather=config.overlap and config.distributed,
        ),
        chunks,
    )
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        _use_fused_kernel(inner.optimizer)
        if isinstance(inner, DistributedOptimizer):
            _repair_order(inner)
        optimizer_state.write_own_share(inner)
    transformer.grad_scale_func = optimizer.scale_loss
    return optimizer


def gradient_norm(optimizer: Any) -> float | torch.Tensor:
    """Prepare the gradients and return their norm over the whole model; weights do not change yet.

    On the device where megatron-core leaves it there. It is not finite where a gradient of any rank is not.
    """
    if optimizer.prepare_grads():
        return math.nan
    norm = optimizer.get_grad_norm()
    return 0.0 if norm is None else norm


def move(optimizer: Any, norm: float | torch.Tensor) -> None:
    """megatron-core's own `step`, after `gradient_norm`, without computing the norm again.

    megatron-core 0.16.1 to 0.19.2, optimizer/optimizer.py: each `step` calls both (lines 596 and 1310 of 0.16.1).
    Remove when one of its methods takes a norm.
    """
    optimizer.prepare_grads, optimizer.get_grad_norm = lambda: False, lambda: norm
    try:
        optimizer.step()
    finally:
        del optimizer.prepare_grads, optimizer.get_grad_norm


def _repair_order(optimizer: DistributedOptimizer) -> None:
    """Let a checkpoint of a bf16 backbone with an fp32 head load: correct each parameter's place in its group.

    megatron-core 0.16.1 to 0.19.2, optimizer/distrib_optimizer.py: `_build_optimizer_group_ranges` (line 260 of
    0.16.1) counts the places through the buffers, bf16 before fp32, but `_build_model_and_main_param_groups` (line
    442) puts fp32 parameters first into the inner optimizer's groups: state then goes to other parameters than it came
    from. Remove when both go by one order.
    """
    if not hasattr(optimizer, "opt_group_ranges") or not hasattr(optimizer, "model_param_group_index_map"):
        effect = "a resumed training may fail or differ where a bf16 model has an fp32 head"
        part = f"{DistributedOptimizer.__module__}.{DistributedOptimizer.__qualname__}"
        patches.leave(part, "it has no model_param_group_index_map of opt_group_ranges", effect)
        return
    for index, group in enumerate(optimizer.opt_group_ranges):
        ordered = sorted(group["params"], key=lambda parameter: parameter.dtype != torch.float32)
        optimizer.model_param_group_index_map.update({p: (index, place) for place, p in enumerate(ordered)})


def _use_fused_kernel(optimizer: Any) -> None:
    """Use torch's fused AdamW kernel, on CPU and CUDA; megatron-core does not set the flag.

    megatron-core 0.16.1 to 0.19.2, optimizer/__init__.py: `torch.optim.AdamW` in the place of Transformer Engine's and
    apex's (line 32 of 0.16.1). Remove when it passes `fused=True`.

    The flag is saved in the checkpoint with the other settings of the groups.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        for group in optimizer.param_groups:
            group["fused"] = True


def _repair_norm() -> None:
    """Keep megatron-core's own gradient norm, its fallback for Transformer Engine's and apex's, on the device.

    megatron-core 0.16.1 to 0.19.2, utils.py: `local_multi_tensor_l2_norm` (line 1200 of 0.16.1) reads the norm of
    every parameter back, one by one, to build one tensor. The norm of those norms is the same number;
    `get_grad_norm_fp32` then reads one. Remove when it builds no tensor of Python numbers.
    """
    own = getattr(megatron_utils, "local_multi_tensor_l2_norm", None)
    used = getattr(clip_grads, "l2_norm_impl", None)
    if own is None or used is None:
        part = (megatron_utils if own is None else clip_grads).__name__
        patches.leave(part, "its names are others", "the gradient norm may wait for the device, which is slower")
    elif used is own:
        clip_grads.l2_norm_impl = _norm_on_device


def _norm_on_device(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """The norm of all tensors together, `[1]`; arguments as apex's `multi_tensor_l2norm`."""
    return torch.nn.utils.get_total_norm(tensor_lists[0]).view(1), None


_repaired = False
_RESUME = (
    "_get_main_param_and_optimizer_states", "_set_main_param_and_optimizer_states", "state_dict", "load_state_dict"
)  # fmt: skip
_INITIALISE = "_init_optimizer_states_with_dummy_values"


def _repair_resume() -> None:
    """Make the distributed optimizer resume correctly when its inner optimizer is ``torch.optim.AdamW``.

    That is so wherever neither Transformer Engine nor apex is installed, on GPUs too. torch keeps a `step` tensor for
    each parameter, which megatron-core does not expect: it treats `step` as shardable (KeyError), wants it to exist
    before the first step and on every rank, however small the model, and loads *one* tensor into every parameter's
    state, which AdamW then counts up once per parameter, so that the first resumed step is right and every later one
    is wrong.

    megatron-core 0.16.1 to 0.19.2, optimizer/distrib_optimizer.py: `_get_main_param_and_optimizer_states`,
    `state_dict` and `load_state_dict` (lines 883, 641 and 825 of 0.16.1). Remove when a resumed run of torch's AdamW
    is the uninterrupted one without it (tests/train/test_training.py).
    """
    global _repaired
    if _repaired or not megatron_optimizer.Adam.__module__.startswith("torch."):
        return
    _repaired = True
    own: Any = {name: getattr(DistributedOptimizer, name, None) for name in _RESUME}
    get_states, set_states, state_dict, load_state_dict = own.values()

    def shardable_states(self: Any, *args: Any, **kwargs: Any) -> dict:
        return {name: value for name, value in get_states(self, *args, **kwargs).items() if name != "step"}

    def set_all_but_steps(self: Any, model_param: torch.Tensor, tensors: dict, *args: Any, **kwargs: Any) -> None:
        states = get_states(self, model_param)
        steps = {"step": states["step"]} if "step" in states else {}
        set_states(self, model_param, {**steps, **tensors}, *args, **kwargs)

    def state_dict_once_initialised(self: Any, *args: Any, **kwargs: Any) -> dict:
        if not self.optimizer.state:
            getattr(self, _INITIALISE)()
        if not self.optimizer.state:  # the share of this data-parallel rank is padding; rank 0's groups are stored
            groups = [{**group, "step": 0.0} for group in self.optimizer.param_groups]
            return {"optimizer": {"param_groups": [{k: v for k, v in g.items() if k != "params"} for g in groups]}}
        return state_dict(self, *args, **kwargs)

    def load_with_own_steps(self: Any, *args: Any, **kwargs: Any) -> None:
        load_inner = self.optimizer.load_state_dict

        def load(inner: dict, *more: Any, **settings: Any) -> None:
            for values in inner["state"].values():
                values["step"] = values["step"].clone()
            load_inner(inner, *more, **settings)

        self.optimizer.load_state_dict = load
        try:
            load_state_dict(self, *args, **kwargs)
        finally:
            del self.optimizer.load_state_dict

    repaired = (shardable_states, set_all_but_steps, state_dict_once_initialised, load_with_own_steps)
    patches.replace(
        DistributedOptimizer,
        "a resumed training may fail or differ; with optimizer.distributed=false it does not",
        (_INITIALISE,),
        **dict(zip(_RESUME, repaired, strict=True)),
    )
