"""Prompt tuning at equal weights against peft, on a Llama of transformers'."""

import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.apply import bind
from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.modeling.base import load_base
from popax.serving.generate import generate

peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

COUNT, VOCAB, DIM, NEW = 5, 96, 64, 12
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (3, 20)).astype(np.int32)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(peft's model with random embeddings of its virtual tokens, the base here, these embeddings)."""
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB, "hidden_size": DIM, "intermediate_size": 80, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **heads)).eval()
    place = tmp_path_factory.mktemp("llama")
    model.save_pretrained(place)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT)
    wrapped = peft.get_peft_model(model, config).eval()
    rows = np.random.default_rng(1).standard_normal((COUNT, DIM)).astype(np.float32)
    wrapped.prompt_encoder["default"].embedding.weight.data = torch.tensor(rows)
    return wrapped, load_base(place), rows


def bound(base, rows):
    cohort = Cohort.of(AdapterConfig(method="prompt", rank=COUNT), base.model.sites())
    shared = cohort.shared(*base.model.site_arrays(base.params))
    return bind(cohort, {"embed": {"prompt": jnp.asarray(rows) - shared["embed"]["rows"]}}, shared)


def test_outputs_are_pefts(pair):
    wrapped, base, rows = pair
    with torch.no_grad():
        wanted = wrapped(torch.asarray(TOKENS, dtype=torch.long)).logits.numpy()[:, COUNT:]
    own = base.model(base.params, jnp.asarray(TOKENS), adapt=bound(base, rows))
    np.testing.assert_allclose(own, wanted, rtol=1e-5, atol=1e-5)


def test_generation_with_a_cache_is_pefts(pair):
    wrapped, base, rows = pair
    own = generate(base.model, base.params, TOKENS.tolist(), adapt=bound(base, rows), max_new_tokens=NEW)
    for prompt, row in zip(TOKENS, own, strict=True):
        text = torch.asarray(prompt, dtype=torch.long)[None]
        with torch.no_grad():
            for _ in range(NEW):
                following = wrapped(text).logits[:, -1].argmax(-1, keepdim=True)
                text = torch.cat((text, following), dim=1)
        assert row.tokens.tolist() == text[0, len(prompt) :].tolist()
