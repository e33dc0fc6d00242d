from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedTrainer
from monai.handlers import from_engine
from monai.inferers import SimpleInferer
from torch import Tensor, nn

from shared_networks.errors import InputError, input_error_in
from shared_networks.networks.precision import AutocastInferer, autocast_type
from shared_networks.training import host_copy
from shared_networks.training.handlers import ClipGradients, KeepLoss, SeedIterations, StopOnNonFinite, batch_cases
from shared_networks.training.host_copy import HostCopy


def trainer(images: list[Any], *handlers: Any, network: nn.Module | None = None, **kwargs: Any) -> SupervisedTrainer:
    """A trainer on pairs of equal input and target, a case a batch."""
    network = network or nn.Linear(1, 1)
    data = [{"image": image, "label": torch.zeros(1), "case": f"case{i}"} for i, image in enumerate(images)]
    return SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=DataLoader(Dataset(data), batch_size=1),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.0),
        loss_function=nn.MSELoss(),
        train_handlers=list(handlers) or None,
        decollate=False,
        **kwargs,
    )


def test_precision_is_chosen_by_device_and_flag() -> None:
    assert autocast_type("cuda", False) is None
    assert autocast_type(torch.device("cpu"), True) is torch.bfloat16


@pytest.mark.parametrize(("bf16", "chosen"), [(True, torch.bfloat16), (False, torch.float16)])
def test_gpus_without_bfloat16_get_float16(monkeypatch: pytest.MonkeyPatch, bf16: bool, chosen: torch.dtype) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    assert autocast_type("cuda:0", True) is chosen


def test_autocast_computes_in_bfloat16_and_returns_float32() -> None:
    network, image = nn.Linear(64, 3), torch.rand(2, 64)
    seen: list[torch.dtype] = []
    network.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    output = AutocastInferer(SimpleInferer(), torch.bfloat16)(image, network)
    exact = AutocastInferer(SimpleInferer(), None)(image, network)
    assert seen == [torch.bfloat16, torch.float32]
    assert output.dtype == torch.float32
    torch.testing.assert_close(exact, network(image), rtol=0, atol=0)
    torch.testing.assert_close(output, exact, rtol=2e-2, atol=2e-2)


def test_clipping_limits_the_gradient_of_the_step_and_reports_it_unclipped() -> None:
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 1.0)
    norms: list[tuple[float, float]] = []
    engine = trainer([torch.tensor([3.0])], ClipGradients(network, 0.5), network=network)

    def note(e: Any) -> None:
        norms.append((float(e.state.grad_norm), float(network.weight.grad.abs())))

    engine.add_event_handler(Events.ITERATION_COMPLETED, note)
    engine.run()
    # loss (3 w)^2, gradient 2 * 9 * w = 18
    assert norms == [(pytest.approx(18.0), pytest.approx(0.5))]


def test_accumulated_gradients_are_those_of_the_joined_batch_and_clipped_once() -> None:
    images = [torch.tensor([value]) for value in (1.0, 2.0, 3.0)]
    joined = nn.Linear(1, 1)
    parts = nn.Linear(1, 1)
    parts.load_state_dict(joined.state_dict())
    joined(torch.tensor([[1.0], [2.0]])).square().mean().backward()
    grads: list[Tensor] = []
    measured: list[float] = []
    engine = trainer(images, ClipGradients(parts), network=parts, accumulation_steps=2)

    def note(e: Any) -> None:
        if getattr(e.state, "grad_norm", None) is not None:
            measured.append(float(e.state.grad_norm))
            grads.append(parts.weight.grad.clone())
            e.state.grad_norm = None

    engine.add_event_handler(Events.ITERATION_COMPLETED, note)
    engine.run()
    torch.testing.assert_close(grads[0], joined.weight.grad)
    norm = math.hypot(joined.weight.grad.item(), joined.bias.grad.item())
    assert measured[0] == pytest.approx(norm)
    assert len(measured) == 2  # after two batches, and after the last, left over


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_before_the_step_and_names_the_case(bad: float) -> None:
    network = nn.Linear(1, 1)
    before = network.weight.detach().clone()
    engine = trainer([torch.ones(1), torch.tensor([bad])], StopOnNonFinite(), network=network)
    engine.optimizer.param_groups[0]["lr"] = 0.1
    with pytest.raises(InputError) as caught:
        engine.run()
    message = str(input_error_in(caught.value))
    assert f"the loss is {bad} in iteration 2" in message
    assert "case1" in message and "case0" not in message
    assert torch.isfinite(network.weight).all() and not torch.equal(network.weight, before)


class Root(nn.Module):
    """A network whose gradient at a target of 0 is no number, though its loss is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, image: Tensor) -> Tensor:
        return (self.weight * image).sqrt()


def test_a_gradient_that_is_no_number_stops_before_the_step_and_names_the_cases_of_the_step() -> None:
    network = Root()
    images = [torch.tensor([value]) for value in (1.0, 1.0, 1.0, 0.0, 1.0)]
    handlers = [ClipGradients(network), StopOnNonFinite()]
    engine = trainer(images, *handlers, network=network, accumulation_steps=2)
    with pytest.raises(InputError) as caught:
        engine.run()
    message = str(input_error_in(caught.value))
    assert "the norm of the gradient is nan in iteration 4 (epoch 1), with the cases case2, case3: look" in message
    assert torch.isfinite(network.weight).all()


def test_a_late_loss_stops_training_soon_and_names_its_own_case(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(HostCopy):
        def arrived(self) -> bool:
            return False

    monkeypatch.setattr(host_copy, "HostCopy", Late)
    network = nn.Linear(1, 1)
    images = [torch.ones(1), torch.tensor([math.nan]), *[torch.ones(1)] * 9]
    engine = trainer(images, ClipGradients(network), StopOnNonFinite(), network=network)
    with pytest.raises(InputError, match=r"the loss is nan in iteration 2 .*, with the cases case1: look"):
        engine.run()
    assert engine.state.iteration == 4  # while later losses and gradients were on their way


def test_the_output_of_an_iteration_is_its_loss_as_monai_reads_it() -> None:
    engine = trainer([torch.ones(1)], KeepLoss())
    engine.run()
    assert isinstance(engine.state.output, list) and engine.state.output[0].keys() == {"loss"}
    loss = from_engine(["loss"], first=True)(engine.state.output)
    assert isinstance(loss, Tensor) and loss.ndim == 0 and not loss.requires_grad


def test_cases_of_a_batch_are_found_in_either_form() -> None:
    image = MetaTensor(torch.zeros(2, 1), meta={"filename_or_obj": ["a.nii.gz", "b.nii.gz"]})
    assert batch_cases({"image": image}) == ["a.nii.gz", "b.nii.gz"]
    assert batch_cases({"image": torch.zeros(2, 1), "case": ["x", "x"]}) == ["x", "x"]
    assert batch_cases({"image": torch.zeros(2, 1)}) == []


def test_random_numbers_depend_on_seed_rank_and_iteration_alone() -> None:
    def drawn(seed: int, rank: int) -> list[float]:
        values: list[float] = []
        engine = trainer([torch.ones(1)] * 3, SeedIterations(seed))
        engine.state.rank = rank
        engine.add_event_handler(Events.ITERATION_STARTED, lambda: values.append(torch.rand(1).item()))
        engine.run()
        return values

    first = drawn(0, 0)
    torch.rand(100)
    assert drawn(0, 0) == first
    assert len(set(first + drawn(0, 1) + drawn(1, 0))) == 9
