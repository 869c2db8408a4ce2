"""Sparse autoencoders: a dictionary that is known is found, codes are as sparse as asked, and their worth is measured right."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact import noisy, shape, tokens
from torch import Tensor

from glassgpt.config import UserError
from glassgpt.interpret import capture
from glassgpt.interpret.sae import Sae, SaeConfig, TrainedSae, fit, load_sae, save_sae, train_sae
from glassgpt.interpret.sae_report import edited_loss, evaluate_sae, loss_recovered, top_contexts
from glassgpt.model import GPT

SMALL = SaeConfig(features=64, k=4, steps=60, batch_tokens=64, learning_rate=5e-3, dead_steps=20)
VARIANTS: dict[str, dict[str, Any]] = {"top-k": {"k": 3}, "L1": {"k": None, "l1": 0.3}}


def sparse_data(width: int = 24, count: int = 40, active: int = 3) -> tuple[Tensor, Tensor]:
    """A dictionary (M, D) of rows of length 1, and sums (N, D) of about three of them, far from zero."""
    generator = torch.Generator().manual_seed(17)  # not the one that the training starts from
    dictionary = F.normalize(torch.randn(count, width, generator=generator), dim=-1)
    is_on = torch.rand(6000, count, generator=generator) < active / count
    codes = is_on * (0.5 + torch.rand(6000, count, generator=generator))
    return dictionary, 7 * (codes @ dictionary + 2 * torch.randn(width, generator=generator))


def found(dictionary: Tensor, rows: Tensor) -> float:
    """For each true direction the cosine of the nearest row; their mean."""
    return float((dictionary @ F.normalize(rows, dim=-1).T).max(dim=1).values.mean())


@functools.cache
def fitted(variant: str) -> tuple[Tensor, Tensor, Sae]:
    dictionary, x = sparse_data()
    return dictionary, x, fit(x, SaeConfig(features=48, steps=600, batch_tokens=256, learning_rate=1e-2, **VARIANTS[variant]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_known_dictionary_is_found(variant: str) -> None:
    dictionary, x, sae = fitted(variant)
    assert found(dictionary, sae.decoder) > 0.95
    assert found(dictionary, torch.randn(48, 24, generator=torch.Generator().manual_seed(5))) < 0.6  # chance
    assert found(dictionary, torch.linalg.svd(x - x.mean(dim=0), full_matrices=False).Vh) < 0.6  # principal components
    codes = sae.encode(x)
    variance = (x - x.mean(dim=0)).square().sum()
    explained = float(1 - (x - sae.decode(codes)).square().sum() / variance)
    assert explained > 0.8
    assert 2 < float((codes > 0).sum(dim=-1).float().mean()) < 4.5  # of 48
    assert codes.min() == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoder_rows_have_length_one_and_scale_is_the_data_s(variant: str) -> None:
    _, x, sae = fitted(variant)
    assert torch.allclose(sae.decoder.norm(dim=-1), torch.ones(48), atol=1e-6, rtol=0)
    assert float((x / sae.scale).norm(dim=-1).mean()) == pytest.approx(24**0.5, rel=1e-5)
    assert torch.equal(sae(x), sae.decode(sae.encode(x)))


def test_k_features_are_active() -> None:
    torch.manual_seed(0)
    sae, x = Sae(16, 64, k=5), torch.randn(100, 16)
    torch.nn.init.normal_(sae.decoder)
    assert ((sae.encode(x) > 0).sum(dim=-1) == 5).all()
    scores = sae.encoder(x)
    assert torch.equal(sae.encode(x).topk(5, dim=-1).values, scores.topk(5, dim=-1).values)
    without = Sae(16, 64)
    without.load_state_dict(sae.state_dict())
    assert torch.equal(without.encode(x), scores.relu())
    assert ((without.encode(x) > 0).sum(dim=-1) > 20).all()
    with torch.no_grad():
        sae.encoder.bias -= 100
    assert (sae.encode(x) == 0).all()  # never below 0


def test_dead_features_are_revived() -> None:
    """A hundred directions in 16 dimensions, one at a time: features that start between two of them never win."""
    generator = torch.Generator().manual_seed(17)  # not the one that the training starts from
    directions = F.normalize(torch.randn(100, 16, generator=generator), dim=-1)
    x = directions[torch.randint(100, (4000,), generator=generator)] * (0.8 + 0.4 * torch.rand(4000, 1, generator=generator))
    config = SaeConfig(features=100, k=1, steps=600, batch_tokens=256, learning_rate=2e-3, dead_steps=25)

    def dead_and_found(config: SaeConfig) -> tuple[float, float]:
        sae = fit(x, config)
        return 1 - float((sae.encode(x) > 0).any(dim=0).float().mean()), found(directions, sae.decoder)

    dead, right = dead_and_found(config)
    dead_without, right_without = dead_and_found(dataclasses.replace(config, dead_steps=10_000))
    assert dead < dead_without - 0.1
    assert right > right_without + 0.03


def test_the_seed_decides() -> None:
    _, x = sparse_data()
    one, again, other = (fit(x, dataclasses.replace(SMALL, steps=5, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one.decoder, again.decoder)
    assert not torch.equal(one.decoder, other.decoder)


# ---------------------------------------------------------------------- in a model


@functools.cache
def small() -> tuple[GPT, list[Tensor], TrainedSae]:
    model = noisy(shape(), torch.float32)
    batches = [tokens(shape(), batch=4, length=20, seed=seed) for seed in (1, 2)]
    return model, batches, train_sae(model, "blocks.1", batches, SMALL)


def test_the_report_is_what_a_plain_computation_gives() -> None:
    model, batches, trained = small()
    report = evaluate_sae(trained, model, batches)
    with capture(model, "blocks.1") as seen, torch.no_grad():
        x = torch.cat([(model(ids), seen["blocks.1"])[1] for ids in batches]).flatten(0, 1)
        logits = torch.cat([model(ids) for ids in batches])[:, :-1]
    rebuilt, codes = trained.sae(x), trained.sae.encode(x)
    targets = torch.cat(batches)[:, 1:]
    assert report.tokens == 160
    assert report.explained_variance == pytest.approx(float(1 - (x - rebuilt).var(0).sum() / x.var(0).sum()), abs=0.02)
    assert 0.3 < report.explained_variance < 1
    assert report.l0 == pytest.approx(float((codes > 0).sum(dim=-1).float().mean()))
    assert report.dead_share == pytest.approx(float((codes.sum(dim=0) == 0).float().mean()))
    assert report.loss_nats == pytest.approx(float(F.cross_entropy(logits.flatten(0, 1), targets.flatten())), abs=1e-5)
    expected = (report.loss_zero_nats - report.loss_sae_nats) / (report.loss_zero_nats - report.loss_nats)
    assert report.loss_recovered == pytest.approx(expected)


def test_a_perfect_reconstruction_recovers_all_and_zeros_nothing() -> None:
    model, batches, trained = small()
    plain = edited_loss(model, "blocks.1", batches, lambda x: x)
    zero = edited_loss(model, "blocks.1", batches, torch.zeros_like)
    assert abs(zero - plain) > 0.01
    assert (loss_recovered(plain, zero, plain), loss_recovered(plain, zero, zero)) == (1, 0)
    width = 16
    identity, nothing = Sae(width, 2 * width), Sae(width, 2 * width)
    with torch.no_grad():
        identity.decoder.copy_(torch.cat((torch.eye(width), -torch.eye(width))))
        identity.encoder.weight.copy_(identity.decoder)
        identity.encoder.bias.zero_()
        for parameter in nothing.parameters():
            parameter.zero_()
    config = SaeConfig(features=2 * width, k=None, l1=1.0)
    perfect = evaluate_sae(dataclasses.replace(trained, sae=identity, config=config), model, batches)
    empty = evaluate_sae(dataclasses.replace(trained, sae=nothing, config=config), model, batches)
    assert perfect.loss_recovered == pytest.approx(1, abs=1e-6)
    assert perfect.explained_variance == pytest.approx(1, abs=1e-9)
    assert perfect.l0 == width  # each number is above or below 0
    assert empty.loss_recovered == 0
    assert (empty.l0, empty.dead_share) == (0, 1)


def test_top_contexts_are_the_tokens_that_activate_most() -> None:
    model, batches, trained = small()
    with capture(model, "blocks.1") as seen, torch.no_grad():
        codes = torch.stack([(model(ids), trained.sae.encode(seen["blocks.1"]))[1] for ids in batches])  # (2, 4, 20, M)
    features = codes.flatten(0, 2).amax(dim=0).topk(3).indices.tolist()
    for feature, contexts in zip(features, top_contexts(trained, model, batches, features, 5, before=2, after=1), strict=True):
        own = codes[..., feature]
        best = own.flatten().topk(5).values
        assert [context.code for context in contexts] == pytest.approx([float(code) for code in best if code > 0], rel=1e-5)
        batch, row, at = (own == own.max()).nonzero()[0].tolist()
        start = max(0, at - 2)
        assert contexts[0].ids == tuple(batches[batch][row, start : at + 2].tolist())
        assert contexts[0].ids[contexts[0].at] == int(batches[batch][row, at])


def test_half_precision_models_are_read_and_edited() -> None:
    model = noisy(shape(), torch.bfloat16)
    _, batches, _ = small()
    report = evaluate_sae(train_sae(model, "blocks.1.mlp", batches, SMALL), model, batches)
    assert report.explained_variance > 0


# ---------------------------------------------------------------------- files and bad input


def test_a_saved_one_is_the_same(tmp_path: Path) -> None:
    model, batches, trained = small()
    save_sae(trained, tmp_path / "sae")
    again = load_sae(tmp_path / "sae")
    assert (again.name, again.config, again.model) == (trained.name, trained.config, trained.model)
    assert all(torch.equal(a, b) for a, b in zip(again.sae.state_dict().values(), trained.sae.state_dict().values(), strict=True))
    assert evaluate_sae(again, model, batches) == evaluate_sae(trained, model, batches)
    with pytest.raises(UserError, match="never overwritten"):
        save_sae(trained, tmp_path / "sae")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no sparse autoencoder here"):
        load_sae(tmp_path)
    save_sae(small()[2], tmp_path / "sae")
    facts_file = tmp_path / "sae" / "sae.json"
    facts = json.loads(facts_file.read_text())
    facts["sae"]["features"] = 63
    facts_file.write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"tensors do not fit sae\.json"):
        load_sae(tmp_path / "sae")
    (tmp_path / "sae" / "sae.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match="truncated or not a weights file"):
        load_sae(tmp_path / "sae")
    facts_file.write_text('{"name": "blocks.1"}')
    with pytest.raises(UserError, match="no sparse autoencoder here"):
        load_sae(tmp_path / "sae")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.1.attn.z", "blocks.1.attn.z' is not one activation with a vector for each token"),
        ("blocks.*", "is not one activation"),
        ("head", "is not one activation"),
        ("blocks.9", "no activation 'blocks.9' in this model"),
    ],
)
def test_activations_that_have_not_one_vector_a_token_are_refused(name: str, message: str) -> None:
    model, batches, _ = small()
    with pytest.raises(UserError, match=message):
        train_sae(model, name, batches, SMALL)


def test_another_model_and_bad_input_are_refused() -> None:
    model, batches, trained = small()
    with pytest.raises(UserError, match="for another model, with n_layer 3; this one has 2"):
        evaluate_sae(trained, noisy(shape(n_layer=2), torch.float32), batches)
    with pytest.raises(UserError, match="numbered 0 to 63; got 64"):
        top_contexts(trained, model, batches, [3, 64])
    with pytest.raises(UserError, match="there is no batch"):
        train_sae(model, "blocks.1", [], SMALL)
    with pytest.raises(UserError, match=r"shape \(B, T\); got \(20,\)"):
        train_sae(model, "blocks.1", [batches[0][0]], SMALL)
    with pytest.raises(UserError, match="all alike"):
        fit(torch.ones(10, 4), SMALL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"l1": 1.0}, "give either sae.k or sae.l1; got k 32 and l1 1.0"),
        ({"k": None}, "give either sae.k or sae.l1"),
        ({"k": 40, "features": 39}, "sae.k 40 is more than sae.features 39"),
        ({"k": None, "l1": -1.0}, "sae.l1 must be above 0"),
        ({"steps": 0}, "sae.steps must be at least 1; got 0"),
    ],
)
def test_options_that_make_none_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SaeConfig(**changes)
