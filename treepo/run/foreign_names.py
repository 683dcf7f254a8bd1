"""Names of settings in other tools. If a user writes one of them, the error message gives the name in treepo.

The names come from TRL 1.16 (GRPOConfig and its parents), verl 0.9.1 (ppo_trainer.yaml) and vLLM 0.32 (engine and
sampling parameters). They are recognised in every section of the configuration.
"""

from __future__ import annotations

OURS: dict[str, str] = {
    # Sampling
    "num_generations": "sampler.width",
    "n": "sampler.width",
    "num_return_sequences": "sampler.width",
    "rollout_n": "sampler.width",
    "num_samples": "sampler.width",
    "group_size": "sampler.width",
    "num_generations_eval": "evaluate.samples",
    "max_completion_length": "sampler.segment_tokens times sampler.max_depth",
    "max_response_length": "sampler.segment_tokens times sampler.max_depth",
    "response_length": "sampler.segment_tokens times sampler.max_depth",
    "max_new_tokens": "sampler.segment_tokens times sampler.max_depth",
    "temperature": "sampler.sampling.temperature",
    "top_p": "sampler.sampling.top_p",
    "top_k": "sampler.sampling.top_k",
    "stop": "sampler.stopping.stop_strings",
    "generation_batch_size": "trainer.prompts_per_step",
    # The engine
    "use_vllm": "engine.kind (vllm)",
    "vllm_mode": "engine.kind (vllm: in this process, server: over HTTP)",
    "vllm_server_base_url": "engine.urls",
    "vllm_server_host": "engine.urls",
    "vllm_server_timeout": "engine.timeout_s",
    "vllm_gpu_memory_utilization": "engine.gpu_memory_utilization",
    "vllm_tensor_parallel_size": "engine.tensor_parallel_size",
    "tensor_model_parallel_size": "engine.tensor_parallel_size",
    "vllm_max_model_length": "engine.max_model_len",
    "block_size": "engine.block_tokens",
    "vllm_importance_sampling_correction": "loss.rollout_cap",
    "vllm_importance_sampling_cap": "loss.rollout_cap",
    "rollout_is_threshold": "loss.rollout_cap",
    # The loss and the advantage
    "beta": "loss.kl",
    "kl_coef": "loss.kl",
    "kl_loss_coef": "loss.kl",
    "use_kl_loss": "loss.kl",
    "epsilon": "loss.clip_low",
    "epsilon_high": "loss.clip_high",
    "cliprange": "loss.clip_low and loss.clip_high",
    "clip_ratio": "loss.clip_low and loss.clip_high",
    "clip_ratio_low": "loss.clip_low",
    "clip_ratio_high": "loss.clip_high",
    "clip_ratio_c": "loss.dual_clip",
    "delta": "loss.dual_clip",
    "loss_type": "loss.kind, and advantage.kind (dr_grpo)",
    "importance_sampling_level": "loss.kind (gspo: one ratio per response)",
    "adv_estimator": "advantage.kind",
    "advantage_estimator": "advantage.kind",
    "scale_rewards": "advantage.kind (grpo divides by the std, dr_grpo does not)",
    "norm_adv_by_std_in_grpo": "advantage.kind (grpo divides by the std, dr_grpo does not)",
    "whiten_rewards": "advantage.whiten",
    # The update
    "learning_rate": "trainer.lr",
    "warmup_steps": "trainer.lr_warmup_steps",
    "lr_warmup_steps": "trainer.lr_warmup_steps",
    "weight_decay": "trainer.weight_decay",
    "max_grad_norm": "trainer.grad_clip",
    "grad_clip": "trainer.grad_clip",
    "clip_grad": "trainer.grad_clip",
    "num_iterations": "trainer.mini_batches",
    "ppo_epochs": "trainer.mini_batches",
    "ppo_mini_batch_size": "trainer.mini_batches (how many, not how large)",
    "steps_per_generation": "trainer.mini_batches",
    "per_device_train_batch_size": "trainer.prompts_per_step (prompts) and trainer.max_tokens (memory)",
    "gradient_accumulation_steps": "trainer.max_tokens (most tokens at once)",
    "ppo_micro_batch_size_per_gpu": "trainer.max_tokens (most tokens at once)",
    "ppo_max_token_len_per_gpu": "trainer.max_tokens",
    "train_batch_size": "trainer.prompts_per_step",
    "gen_batch_size": "trainer.dynamic_sampling.oversample",
    "filter_groups": "trainer.dynamic_sampling",
    "max_num_gen_batches": "trainer.dynamic_sampling.rounds",
    "enable_gradient_checkpointing": "trainer.gradient_checkpointing",
    "bf16": "trainer.precision (bfloat16)",
    "overlong_buffer": "trainer.overlong_tokens and trainer.overlong_penalty",
    # The run
    "max_steps": "trainer.steps",
    "total_training_steps": "trainer.steps",
    "save_steps": "trainer.save_every",
    "save_freq": "trainer.save_every",
    "save_total_limit": "trainer.keep_checkpoints",
    "max_actor_ckpt_to_keep": "trainer.keep_checkpoints",
    "eval_steps": "trainer.eval_every",
    "test_freq": "trainer.eval_every",
    "report_to": "trainer.trackers",
    "logger": "trainer.trackers",
    "log_completions": "trainer.save_trees_every",
    "output_dir": "out",
    "default_local_dir": "out",
    "model_name_or_path": "model.path",
    "peft_config": "model.lora",
    "lora_rank": "model.lora.rank",
    "lora_r": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
    "lora_target_modules": "model.lora.targets",
    "target_modules": "model.lora.targets",
    "torch_dtype": "model.dtype",
    # The data and its rewards
    "dataset_name": "task.path",
    "train_files": "task.path",
    "val_files": "task.test_path",
    "dataset_config": "task.name",
    "dataset_train_split": "task.split",
    "dataset_test_split": "task.test_split",
    "prompt_key": "task.prompt_column",
    "question_column": "task.prompt_column",
    "answer_key": "task.answer_column",
    "system_prompt": "task.system",
    "reward_funcs": "task.reward",
    "reward_fn": "task.reward",
    "custom_reward_function": "task.reward",
    "max_train_samples": "task.limit",
    "train_max_samples": "task.limit",
}
"""Name in another tool -> setting in treepo, with a note in parentheses if the two are not the same."""


def hint(key: str, place: str = "") -> str:
    """`"; here it is called sampler.width"` for a name of another tool, `""` for other names.

    `place`: the key with its sections, such as `sampler.width`. A key that is right at `place` gives `""`.
    """
    ours = OURS.get(key)
    return f"; here it is called {ours}" if ours is not None and ours != place else ""
