"""Names that other libraries give to our keys: suggested, never taken, for one name may mean several things."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_steerlm.config.schema import keys
from nemo_steerlm.errors import suggest

# name: our key; several where verbs differ. By section of our configuration; sources: the fields of transformers'
# TrainingArguments and TRL's SFTConfig and RewardConfig, and the configurations of NeMo and NeMo-Aligner.
ALIASES: dict[str, tuple[str, ...]] = {
    "output_dir": ("output",),
    "exp_manager.explicit_log_dir": ("output",),
    "exp_manager.exp_dir": ("output",),
    "data_seed": ("seed",),
    "model.seed": ("seed",),
    "resume_from_checkpoint": ("resume",),
    "exp_manager.resume_if_exists": ("resume",),
    # model
    "model_name_or_path": ("model.init", "checkpoint"),
    "pretrained_checkpoint.restore_from_path": ("model.init",),
    "model.restore_from_path": ("model.init",),
    "gpt_model_file": ("checkpoint", "model.init"),
    "tokenizer_name_or_path": ("model.tokenizer", "tokenizer"),
    "model.tokenizer.model": ("model.tokenizer",),
    "lora_r": ("model.lora.rank",),
    "lora_rank": ("model.lora.rank",),
    "lora_alpha": ("model.lora.alpha",),
    "lora_dropout": ("model.lora.dropout",),
    "lora_target_modules": ("model.lora.targets",),
    "target_modules": ("model.lora.targets",),
    "model.peft.lora_tuning.adapter_dim": ("model.lora.rank",),
    "model.peft.lora_tuning.alpha": ("model.lora.alpha",),
    "model.peft.lora_tuning.adapter_dropout": ("model.lora.dropout",),
    "model.peft.lora_tuning.target_modules": ("model.lora.targets",),
    "model.num_layers": ("model.architecture.num_layers",),
    "model.hidden_size": ("model.architecture.hidden_size",),
    "model.ffn_hidden_size": ("model.architecture.ffn_hidden_size",),
    "model.num_attention_heads": ("model.architecture.num_attention_heads",),
    "model.max_position_embeddings": ("model.architecture.max_position_embeddings",),
    "model.init_method_std": ("model.architecture.init_std",),
    # data
    "dataset_name": ("data.train", "input"),
    "train_file": ("data.train",),
    "validation_file": ("data.val",),
    "model.data.train_ds.file_path": ("data.train",),
    "model.data.validation_ds.file_path": ("data.val",),
    "model.data.data_prefix": ("data.train",),
    "max_seq_length": ("data.max_length", "max_length"),
    "max_seq_len": ("data.max_length", "max_length"),
    "model_max_length": ("data.max_length", "max_length"),
    "seq_length": ("data.max_length", "max_length"),
    "model.encoder_seq_length": ("data.max_length",),
    "model.data.seq_length": ("data.max_length",),
    "model.data.train_ds.max_seq_length": ("data.max_length",),
    # trainer
    "batch_size": ("trainer.global_batch_size", "sampling.batch_size", "steering.batch_size"),
    "train_batch_size": ("trainer.global_batch_size",),
    "model.global_batch_size": ("trainer.global_batch_size",),
    "model.data.train_ds.global_batch_size": ("trainer.global_batch_size",),
    "gradient_accumulation_steps": ("trainer.global_batch_size",),
    "per_device_train_batch_size": ("trainer.micro_batch_size",),
    "per_gpu_train_batch_size": ("trainer.micro_batch_size",),
    "model.micro_batch_size": ("trainer.micro_batch_size",),
    "model.data.train_ds.micro_batch_size": ("trainer.micro_batch_size",),
    "epochs": ("trainer.max_epochs",),
    "num_epochs": ("trainer.max_epochs",),
    "num_train_epochs": ("trainer.max_epochs",),
    "trainer.sft.max_epochs": ("trainer.max_epochs",),
    "trainer.rm.max_epochs": ("trainer.max_epochs",),
    "steps": ("trainer.max_steps",),
    "num_train_steps": ("trainer.max_steps",),
    "trainer.sft.max_steps": ("trainer.max_steps",),
    "trainer.rm.max_steps": ("trainer.max_steps",),
    "eval_steps": ("trainer.val_every",),
    "trainer.val_check_interval": ("trainer.val_every",),
    "trainer.sft.val_check_interval": ("trainer.val_every",),
    "trainer.rm.val_check_interval": ("trainer.val_every",),
    "trainer.limit_val_batches": ("trainer.val_batches",),
    "trainer.sft.limit_val_batches": ("trainer.val_batches",),
    "trainer.rm.limit_val_batches": ("trainer.val_batches",),
    "save_steps": ("trainer.checkpoint_every",),
    "trainer.sft.save_interval": ("trainer.checkpoint_every",),
    "trainer.rm.save_interval": ("trainer.checkpoint_every",),
    "save_total_limit": ("trainer.keep_checkpoints",),
    "exp_manager.checkpoint_callback_params.save_top_k": ("trainer.keep_checkpoints",),
    "metric_for_best_model": ("trainer.best_metric",),
    "exp_manager.checkpoint_callback_params.monitor": ("trainer.best_metric",),
    "logging_steps": ("trainer.log_every",),
    "trainer.log_every_n_steps": ("trainer.log_every",),
    "disable_tqdm": ("trainer.progress_bar",),
    "trainer.enable_progress_bar": ("trainer.progress_bar",),
    "bf16": ("trainer.precision",),
    "fp16": ("trainer.precision",),
    "dtype": ("trainer.precision",),
    "torch_dtype": ("trainer.precision",),
    "model.precision": ("trainer.precision",),
    "gradient_checkpointing": ("trainer.recompute",),
    "activation_checkpointing": ("trainer.recompute",),
    "model.activations_checkpoint_granularity": ("trainer.recompute",),
    "no_cuda": ("trainer.accelerator",),
    "use_cpu": ("trainer.accelerator",),
    "nproc_per_node": ("trainer.devices",),
    "num_gpus": ("trainer.devices",),
    "gpus": ("trainer.devices",),
    "nnodes": ("trainer.num_nodes",),
    # parallel
    "tensor_parallel_size": ("parallel.tensor",),
    "tensor_model_parallel_size": ("parallel.tensor",),
    "model.tensor_model_parallel_size": ("parallel.tensor",),
    "pipeline_parallel_size": ("parallel.pipeline",),
    "pipeline_model_parallel_size": ("parallel.pipeline",),
    "model.pipeline_model_parallel_size": ("parallel.pipeline",),
    "model.virtual_pipeline_model_parallel_size": ("parallel.virtual_pipeline",),
    "sequence_parallel": ("parallel.sequence",),
    "model.sequence_parallel": ("parallel.sequence",),
    "context_parallel_size": ("parallel.context",),
    "model.context_parallel_size": ("parallel.context",),
    # optimizer
    "learning_rate": ("optimizer.lr",),
    "model.optim.lr": ("optimizer.lr",),
    "model.optim.sched.min_lr": ("optimizer.min_lr",),
    "adam_beta1": ("optimizer.beta1",),
    "adam_beta2": ("optimizer.beta2",),
    "model.optim.betas": ("optimizer.beta1",),
    "adam_epsilon": ("optimizer.eps",),
    "model.optim.weight_decay": ("optimizer.weight_decay",),
    "max_grad_norm": ("optimizer.clip_grad",),
    "grad_clip": ("optimizer.clip_grad",),
    "trainer.gradient_clip_val": ("optimizer.clip_grad",),
    "trainer.sft.gradient_clip_val": ("optimizer.clip_grad",),
    "trainer.rm.gradient_clip_val": ("optimizer.clip_grad",),
    "lr_scheduler_type": ("optimizer.schedule",),
    "model.optim.sched.name": ("optimizer.schedule",),
    "num_warmup_steps": ("optimizer.warmup_steps",),
    "warmup_ratio": ("optimizer.warmup_steps",),
    "model.optim.sched.warmup_steps": ("optimizer.warmup_steps",),
    # logging
    "run_name": ("logging.name",),
    "report_to": ("logging.wandb",),
    "logging_dir": ("logging.tensorboard",),
    "exp_manager.create_wandb_logger": ("logging.wandb",),
    "exp_manager.create_tensorboard_logger": ("logging.tensorboard",),
    "exp_manager.wandb_logger_kwargs.project": ("logging.wandb_project",),
    # drawing responses
    "max_tokens": ("sampling.max_new_tokens", "max_new_tokens"),
    "max_length": ("data.max_length",),
    "num_return_sequences": ("responses", "sampling.responses"),
}  # fmt: skip


def unknown(key: str, schema: type, groups: Sequence[str] = ()) -> str:
    """The message about a key that does not exist, with the one that was probably meant."""
    known = [*keys(schema), *groups]
    meant = next((ours for ours in ALIASES.get(key, ()) if ours in known), None)
    branch, _, leaf = key.rpartition(".")
    elsewhere = {name.rpartition(".")[2]: name for name in known if "." in name}
    if meant or leaf in elsewhere:
        hint = f"; did you mean '{meant or elsewhere[leaf]}'?"
    elif branch in known:
        beside = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == branch]
        hint = suggest(leaf, beside).replace("'", f"'{branch}.", 1)
    else:
        hint = suggest(key, known)
    return f"unknown key '{key}'{hint or '; --help lists the keys'}"
