"""The linear maps of real models, from which arg specs are made: (d_in, d_out) as the published configurations say."""

from typing import NamedTuple


class Site(NamedTuple):
    """One linear map. wide: the model's largest MLP map, its representative where one must do."""

    model: str
    name: str
    d_in: int
    d_out: int
    wide: bool = False

    @property
    def label(self) -> str:
        return f"{self.model}_{self.name}"


# Sites of equal shape stand once (k_proj also for v_proj, gate_proj also for up_proj).
SITES = (
    Site("qwen3_0_6b", "q_proj", 1024, 2048),
    Site("qwen3_0_6b", "k_proj", 1024, 1024),
    Site("qwen3_0_6b", "o_proj", 2048, 1024),
    Site("qwen3_0_6b", "gate_proj", 1024, 3072, wide=True),
    Site("qwen3_0_6b", "down_proj", 3072, 1024),
    Site("qwen3_8b", "q_proj", 4096, 4096),
    Site("qwen3_8b", "k_proj", 4096, 1024),
    Site("qwen3_8b", "gate_proj", 4096, 12288, wide=True),
    Site("qwen3_8b", "down_proj", 12288, 4096),
    Site("llama3_1_70b", "q_proj", 8192, 8192),
    Site("llama3_1_70b", "k_proj", 8192, 1024),
    Site("llama3_1_70b", "gate_proj", 8192, 28672, wide=True),
    Site("llama3_1_70b", "down_proj", 28672, 8192),
    # Kimi-K2's attention is latent: 64 heads of 128 + 64 dimensions, latents of 1,536 (queries) and 512 + 64 (keys).
    Site("kimi_k2", "q_a_proj", 7168, 1536),
    Site("kimi_k2", "q_b_proj", 1536, 12288),
    Site("kimi_k2", "kv_a_proj", 7168, 576),
    Site("kimi_k2", "kv_b_proj", 512, 16384),
    Site("kimi_k2", "o_proj", 8192, 7168),
    Site("kimi_k2", "shared_gate_proj", 7168, 2048),
    Site("kimi_k2", "shared_down_proj", 2048, 7168),
    Site("kimi_k2", "dense_gate_proj", 7168, 18432, wide=True),
    Site("kimi_k2", "dense_down_proj", 18432, 7168),
)

SITE = {site.label: site for site in SITES}
MODELS = tuple(dict.fromkeys(site.model for site in SITES))
WIDE = {site.model: site for site in SITES if site.wide}
RANKS = (1, 8, 16, 64)
