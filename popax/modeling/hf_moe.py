"""The parts of a config.json that describe experts and latent attention (Qwen3-MoE, DeepSeek-V3, Kimi-K2)."""

from collections.abc import Mapping
from typing import Any

from popax.modeling.block_config import MLAConfig, MoEConfig

DEEPSEEK, QWEN3_MOE = "DeepseekV3ForCausalLM", "Qwen3MoeForCausalLM"
EXPERTS = ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
# How many experts there are: as published, and as transformers 5 writes it for every family.
COUNT = {QWEN3_MOE: "num_experts", DEEPSEEK: "n_routed_experts"}
ANY_COUNT = "num_local_experts"
REQUIRED = {
    QWEN3_MOE: EXPERTS,
    DEEPSEEK: (
        *(*EXPERTS, "n_shared_experts", "first_k_dense_replace", "n_group", "topk_group"),
        *("routed_scaling_factor", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    ),
}
# What these keys say is the only thing that popax computes; absent keys say the same.
ONLY = {
    QWEN3_MOE: {"decoder_sparse_step": 1},
    DEEPSEEK: {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
}


def moe_problems(record: Mapping[str, Any], architecture: str) -> list[str]:
    """What of a config.json's experts and latent attention is missing or not supported."""
    problems = [f"{key} is missing" for key in REQUIRED.get(architecture, ()) if key not in record]
    if architecture in COUNT and not {COUNT[architecture], ANY_COUNT} & set(record):
        problems.append(f"{COUNT[architecture]} is missing")
    for key, value in ONLY.get(architecture, {}).items():
        if record.get(key, value) != value:
            problems.append(f"{key}={record[key]!r} is not supported, only {value!r}")
    dense = list(record.get("mlp_only_layers", ()))
    if architecture == QWEN3_MOE and dense != list(range(len(dense))):
        problems.append(f"mlp_only_layers={dense} is not supported, only the first layers")
    return problems


def moe_config(record: Mapping[str, Any], architecture: str) -> MoEConfig | None:
    """The experts of a config.json without `moe_problems`; None for a dense model."""
    if architecture not in REQUIRED:
        return None
    common = {
        "num_experts": record.get(COUNT[architecture], record.get(ANY_COUNT)),
        "experts_per_token": record["num_experts_per_tok"],
        "expert_ffw_dim": record["moe_intermediate_size"],
        "normalize_top_k": bool(record["norm_topk_prob"]),
    }
    if architecture == QWEN3_MOE:
        dense = len(record.get("mlp_only_layers", ()))
        return MoEConfig(**common, first_dense_layers=dense)
    return MoEConfig(
        **common,
        shared_ffw_dim=record["moe_intermediate_size"] * record["n_shared_experts"],
        first_dense_layers=record["first_k_dense_replace"],
        scoring="sigmoid",
        routed_scaling=float(record["routed_scaling_factor"]),
        num_groups=record["n_group"],
        top_groups=record["topk_group"],
        correction_bias=True,
    )


def mla_config(record: Mapping[str, Any], architecture: str) -> MLAConfig | None:
    """The latent attention of a config.json without `moe_problems`; None for grouped-query attention."""
    if architecture != DEEPSEEK:
        return None
    return MLAConfig(
        q_latent_dim=record.get("q_lora_rank"),
        kv_latent_dim=record["kv_lora_rank"],
        nope_head_dim=record["qk_nope_head_dim"],
        rope_head_dim=record["qk_rope_head_dim"],
        v_head_dim=record["v_head_dim"],
    )
