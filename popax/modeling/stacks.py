"""The stacks of a model's layers: layers of one stack have equal shapes, and a scan goes over each."""

from typing import NamedTuple

from popax.modeling.config import ModelConfig

DENSE, MAIN = "dense_layers", "layers"


class Stack(NamedTuple):
    """name: in params and in the names of sites. first_layer: the number in the model of the first of num_layers."""

    name: str
    first_layer: int
    num_layers: int
    routed: bool


def stacks(config: ModelConfig) -> tuple[Stack, ...]:
    """In the order of the forward pass; the last one is "layers", and the only one where all layers are alike."""
    if config.moe is None:
        return (Stack(MAIN, 0, config.num_layers, False),)
    dense = config.moe.first_dense_layers
    main = Stack(MAIN, dense, config.num_layers - dense, True)
    return (Stack(DENSE, 0, dense, False), main) if dense else (main,)


def hidden_site(stack: Stack) -> str:
    """The name of what a stack's blocks hand on, where an adapter may act."""
    return f"{stack.name}.out"


def stack_sites(config: ModelConfig, stack: Stack) -> tuple[str, ...]:
    """The names of a stack's linear sites, in the order of the forward pass."""
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    if config.mla is not None:
        queries = ("q_proj",) if config.mla.q_latent_dim is None else ("q_a_proj", "q_b_proj")
        attention = (*queries, "kv_a_proj", "kv_b_proj", "o_proj")
    sites = [f"attn.{name}" for name in attention]
    mlp = ("gate_proj", "up_proj", "down_proj")
    if not stack.routed:
        sites += [f"mlp.{name}" for name in mlp]
    else:
        sites += ["moe.router", *(f"moe.experts.{name}" for name in mlp)]
        sites += [f"moe.shared.{name}" for name in mlp] if config.moe and config.moe.shared_ffw_dim else []
    return tuple(f"{stack.name}.{site}" for site in sites)
