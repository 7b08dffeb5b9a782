"""Every weight is moved by one rule, and several optimisers are saved and led as one."""

import copy

import pytest
import torch

from wakesleep.streams.errors import Refused
from wakesleep.streams.optimizers import PARTS, make_optimizer, part_norms, part_of
from wakesleep.streams.training_config import OptimConfig
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.store import StoreConfig

RULES = ("adamw", "muon")


@pytest.fixture
def model() -> TTLModel:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=32,
        dim=16,
        num_layers=2,
        num_heads=2,
        head_dim=8,
        mlp_dim=32,
        window=16,
        chunk=8,
        memory_layers=(0,),
        store_layers=(1,),
        store=StoreConfig(capacity=8, hidden=24),
    )
    return TTLModel(config)


def learn(model, optimizer, steps: int, seed: int = 0) -> None:
    tokens = torch.randint(32, (2, 40), generator=torch.Generator().manual_seed(seed))
    for _ in range(steps):
        y, state, _ = model(tokens, model.init_state(2))
        taught = state.blocks[1].store.score[state.blocks[1].store.position >= 0].sum()
        optimizer.zero_grad()
        (y.square().mean() + taught).backward()
        optimizer.step()


@pytest.mark.parametrize("rule", RULES)
def test_every_weight_is_moved_once_and_only_matrices_decay(model, rule):
    names = {id(p): name for name, p in model.named_parameters()}
    groups = make_optimizer(model, OptimConfig(rule=rule, weight_decay=0.3)).param_groups
    moved = [id(p) for group in groups for p in group["params"]]
    assert sorted(moved) == sorted(names)
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    decays = {names[id(p)].split(".", 2)[2].removesuffix(".weight") for p in groups[0]["params"]}
    linear = {f"{part}.{map}" for part in ("attention", "memory") for map in ("qkv", "out")}
    assert decays == linear | {"mlp_in", "mlp_out", "attention.store.head.0"}


@pytest.mark.parametrize("rule", RULES)
def test_saved_and_loaded_it_goes_on_as_before(model, rule):
    optim = OptimConfig(rule=rule)
    optimizer = make_optimizer(model, optim)
    learn(model, optimizer, 3)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    learn(model, optimizer, 2)
    other = copy.deepcopy(model)
    other.load_state_dict(weights)
    again = make_optimizer(other, optim)
    again.load_state_dict(saved)
    learn(other, again, 2)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("rule", RULES)
def test_the_schedule_leads_all_groups(model, rule):
    optimizer = make_optimizer(model, OptimConfig(rule=rule, lr=0.5, lr_rest=0.25))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = copy.deepcopy(model.state_dict())
    learn(model, optimizer, 1)
    schedule.step()
    assert [
        name for name, p in model.state_dict().items() if not torch.equal(p, before[name])
    ] == []


def test_muon_moves_a_matrix_in_all_directions_alike(model):
    spread = {}
    for rule in RULES:
        twin = copy.deepcopy(model)
        weight = twin.blocks[0].mlp_out.weight
        before = weight.detach().clone()
        learn(twin, make_optimizer(twin, OptimConfig(rule=rule, weight_decay=0.0)), 1)
        values = torch.linalg.svdvals(weight.detach() - before)
        spread[rule] = float(values[-4] / values[0])  # the gradient has a rank of about 13
    assert spread["muon"] > 0.5 > 2 * spread["adamw"]


def test_a_torch_without_muon_is_told(model, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(Refused, match=r"torch 2\.9"):
        make_optimizer(model, OptimConfig(rule="muon"))


def test_norms_of_the_parts_make_up_the_whole(model):
    learn(model, torch.optim.SGD(model.parameters(), lr=0.0), 1)
    norms = part_norms(model)
    assert set(norms) == set(PARTS) and all(norm > 0 for norm in norms.values())
    gradients = [p.grad for p in model.parameters()]
    whole = float(torch.nn.utils.get_total_norm(gradients))
    assert sum(norm**2 for norm in norms.values()) == pytest.approx(whole**2, rel=1e-5)
    assert part_of("blocks.1.attention.store.head.0.weight") == "store"
    assert part_of("blocks.0.mlp_norm.weight") == part_of("norm.weight") == "norm"
