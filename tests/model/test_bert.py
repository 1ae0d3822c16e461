"""Names, initial weights and refusals of the model, without transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pretrain.config.sections import ModelSection, ObjectiveSection
from pretrain.errors import ConfigError
from pretrain.model.bert import Bert
from pretrain.model.initialise import initial_value
from pretrain.model.layer_spec import plain_layers
from pretrain.model.pretraining import BertForPretraining
from pretrain.planner.vocabulary import padded_vocab_size

CONFIG = ModelSection(
    num_layers=2, hidden_size=8, num_attention_heads=2, ffn_hidden_size=16, max_position_embeddings=10
)


def _weights(seed: int, config: ModelSection = CONFIG) -> dict[str, torch.Tensor]:
    return dict(Bert(config, 13, plain_layers(), seed=seed).state_dict())


def test_names_are_those_of_a_pipeline_of_layers() -> None:
    encoder = [
        f"{index}.{module}.{kind}"
        for index in (2, 3)
        for module in ("qkv", "attention_out", "attention_norm", "ffn_in", "ffn_out", "ffn_norm")
        for kind in ("weight", "bias")
    ]
    assert list(_weights(0)) == [
        "tied_modules.word.weight",
        "1.position.weight",
        "1.token_type.weight",
        "1.norm.weight",
        "1.norm.bias",
        *encoder,
        "4.dense.weight",
        "4.dense.bias",
        "4.norm.weight",
        "4.norm.bias",
        "6.bias",
    ]


def test_initial_weights_are_berts() -> None:
    for name, parameter in _weights(5, CONFIG.model_copy(update={"initializer_range": 0.1})).items():
        if name.endswith("bias"):
            assert not parameter.any()
        elif name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif parameter.numel() > 50:
            assert abs(parameter.mean()) < 0.05
            assert 0.06 < parameter.std() < 0.14


def test_initial_weights_are_a_function_of_seed_and_name() -> None:
    torch.manual_seed(1)
    first = _weights(5)
    torch.manual_seed(2)
    again, other, deeper = _weights(5), _weights(6), _weights(5, CONFIG.model_copy(update={"num_layers": 4}))
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        assert torch.equal(parameter, initial_value(name, tuple(parameter.shape), 0.02, seed=5))
    assert not torch.equal(first["2.qkv.weight"], other["2.qkv.weight"])
    assert not torch.equal(first["2.qkv.weight"], first["3.qkv.weight"])
    assert torch.equal(first["2.qkv.weight"], deeper["2.qkv.weight"])


def test_every_parameter_takes_part() -> None:
    model = Bert(CONFIG, 13, plain_layers())
    ids_BL = torch.arange(12).view(2, 6)
    hidden_TD, _ = model.encode(ids_BL, torch.ones_like(ids_BL))
    torch.nn.functional.cross_entropy(model.predict(hidden_TD, torch.tensor([1, 8])), torch.tensor([2, 3])).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_dropout_acts_in_training_only_and_where_it_is_set() -> None:
    ids_BL = torch.arange(12).view(2, 6)
    segment_BL = torch.ones_like(ids_BL)
    for change in (
        {"hidden_dropout": 0.5, "attention_dropout": 0.0},
        {"hidden_dropout": 0.0, "attention_dropout": 0.5},
    ):
        model = Bert(CONFIG.model_copy(update=change), 13, plain_layers(), has_padding=False)
        hidden, embedding = model.encode(ids_BL, segment_BL)
        hidden_again, embedding_again = model.encode(ids_BL, segment_BL)
        assert not torch.equal(hidden, hidden_again)
        assert torch.equal(embedding, embedding_again) == (change["hidden_dropout"] == 0)
        model.eval()
        assert torch.equal(model.encode(ids_BL, segment_BL)[0], model.encode(ids_BL, segment_BL)[0])


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match=r"hidden_size \(8\).*heads \(3\)"):
        Bert(CONFIG.model_copy(update={"num_attention_heads": 3}), 13, plain_layers())
    model = Bert(CONFIG, 13, plain_layers())
    with pytest.raises(ConfigError, match=r"rows of 11 tokens.*\(10\)"):
        model.encode(torch.zeros(1, 11, dtype=torch.int64), torch.ones(1, 11, dtype=torch.int64))


@pytest.mark.slow
def test_the_plain_model_imports_neither_megatron_nor_deepspeed() -> None:
    program = (
        "import sys; from pretrain.model import pretraining; from pretrain.model.layer_spec import plain_layers; "
        "plain_layers(); tops = {m.split('.')[0] for m in sys.modules}; "
        "sys.exit(bool(tops & {'megatron', 'deepspeed', 'transformers'}))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_packed_row_gives_each_document_what_it_gives_alone() -> None:
    """Hidden states and embeddings, whatever stands beside the document in its row."""
    model = Bert(CONFIG, 13, plain_layers(), separate_documents=True, seed=3).eval()
    lengths = (3, 4, 2)
    segment_BL = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 3, 3, 0], [1] * 10])
    ids_BL = torch.randint(0, 13, (2, 10), generator=torch.Generator().manual_seed(0))
    packed = [tensor.view(2, 10, -1)[0] for tensor in model.encode(ids_BL, segment_BL)]
    alone = Bert(CONFIG, 13, plain_layers(), seed=3).eval()
    first = 0
    for length in lengths:
        own_BL = ids_BL[:1, first : first + length]
        for found_LD, expected_LD in zip(packed, alone.encode(own_BL, torch.ones_like(own_BL)), strict=True):
            torch.testing.assert_close(found_LD[first : first + length], expected_LD, rtol=0, atol=1e-5)
        first += length
    whole = alone.encode(ids_BL[1:], segment_BL[1:])[0]
    torch.testing.assert_close(model.encode(ids_BL, segment_BL)[0].view(2, 10, -1)[1], whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "ranks", "rows"), [(30_522, 1, 30_528), (30_522, 2, 30_592), (30_522, 4, 30_720), (64, 1, 64), (1, 1, 64)]
)
def test_the_word_matrix_has_rows_for_even_parts(words: int, ranks: int, rows: int) -> None:
    assert padded_vocab_size(words, ranks) == rows


def test_rows_that_stand_for_no_word_stay_zero() -> None:
    """They get no gradient, and neither weight decay nor momentum moves them; no reader of the model sees them."""
    model = BertForPretraining(CONFIG, 13, plain_layers(), ObjectiveSection(num_negatives=2), seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    ids_BL = torch.arange(12).view(2, 6)
    batch = (ids_BL, torch.ones_like(ids_BL), torch.ones(2, 6, dtype=torch.bool))
    for step in range(3):
        model(*batch, torch.tensor([1, 8]), torch.tensor([12, -100]), step).total.backward()
        optimizer.step()
    for parameter in (model.tied_modules["word"].weight, model.get_submodule("6").bias):
        assert isinstance(parameter, torch.nn.Parameter)
        assert parameter.grad is not None
        assert len(parameter) == 64
        assert parameter[:13].any()
        assert not parameter[13:].any()
        assert not parameter.grad[13:].any()
    assert model.logits(ids_BL, torch.ones_like(ids_BL)).shape == (2, 6, 13)


def test_a_state_dict_has_the_words_alone_and_both_forms_are_read() -> None:
    model, other = Bert(CONFIG, 13, plain_layers(), seed=1), Bert(CONFIG, 13, plain_layers(), seed=2)
    state = model.state_dict()
    assert state["tied_modules.word.weight"].shape == (13, 8)
    assert state["6.bias"].shape == (13,)
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    other.load_state_dict(dict(model.named_parameters()))
    with pytest.raises(RuntimeError, match="size mismatch for tied_modules.word.weight"):
        other.load_state_dict({**state, "tied_modules.word.weight": torch.zeros(12, 8)})
