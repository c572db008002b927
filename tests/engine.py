"""What tests of the engine share: small models of every kind, and a batch of replicates beside its twins."""

import numpy as np
import torch
from oracles import scrambled
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, Normal

from gradiometer.bench.batched import Batch, dense
from gradiometer.bench.gradients import Draw, estimated, one, trainable
from gradiometer.bench.models.toys import Expectation, FunctionToy
from gradiometer.bench.models.vae import VAE, Architecture
from gradiometer.bench.problems import Problem, reason_to_skip
from gradiometer.estimators.base import Estimator, State
from gradiometer.estimators.noise import Rng
from gradiometer.estimators.registry import parse

WORDS = (
    "sgvb-a", "sgvb-a:K=3", "sgvb-b:K=2", "stl:K=2", "reinforce:K=2", "moving-average:K=2", "rloo:K=3", "iwae:K=3", "dreg:K=3",
    "vimco:K=3", "rws:K=3", "rws-dreg:K=3", "vr:K=3", "vr:K=3,alpha=-1.5", "ciwae:K=3", "tvo:K=3", "tvo:K=3,partitions=5",
    "nvi:K=3", "nvi:K=3,levels=3,resample=systematic,path=learned", "iwae-stl:K=3", "iwae-score:K=3", "nvil:K=3",
    "concrete:K=2", "disarm:K=4", "rebar:K=2", "relax:K=3",
)  # fmt: skip


KINDS = {
    "gaussian": Architecture(data=5, hidden=(4,), latent=(3,)),
    "bernoulli": Architecture(data=5, hidden=(4, 3), latent=(3,), kind="bernoulli", activation="leaky-relu"),
    "categorical": Architecture(data=5, hidden=(4,), latent=(2,), kind="categorical", classes=3),
    "gaussian likelihood": Architecture(data=5, hidden=(4,), latent=(2,), likelihood="gaussian", activation="relu"),
    "linear": Architecture(data=5, hidden=(), latent=(3,), kind="bernoulli"),
    "two layers": Architecture(data=5, hidden=(4,), latent=(3, 2), between=(3,)),
    "three binary layers": Architecture(data=5, hidden=(4,), latent=(3, 2, 2), between=(3,), kind="bernoulli"),
    "two categorical layers": Architecture(
        data=5, hidden=(4,), latent=(2, 3), between=(4,), kind="categorical", classes=3
    ),
}


def vae(kind: str = "gaussian") -> nn.Module:
    return scrambled(VAE(KINDS[kind]), seed=1, scale=0.4)


def data(B: int, D: int = 5) -> Tensor:
    return (torch.rand(B, D, generator=torch.Generator().manual_seed(2)) < 0.4).double()


def home(word: str) -> nn.Module:
    """The Gaussian model, or the first that has what the estimator needs."""
    return next(m for m in map(vae, KINDS) if reason_to_skip(Problem(m, data(2)), parse(word)) is None)


def memory(estimator: Estimator, model: nn.Module, x: Tensor) -> State:
    """Memory that is not what it was at birth, without hundreds of steps."""
    torch.manual_seed(3)
    state = estimator.init_state(model, x)
    for name, average in state.tracked.items():
        average.update(torch.tensor({"signal": -1.3, "square": 9.0}[name], dtype=x.dtype))
    for module in state.learned.values():
        module.to(x.dtype)
        for parameter in module.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return state


def binary(units: int) -> nn.Module:
    """Of Bernoulli latents, with probabilities on either side of one half for `IMAGES`."""
    model = VAE(Architecture(data=4, hidden=(3,), latent=(units,), kind="bernoulli"))
    return scrambled(model, seed=134, scale=1.2)


IMAGES = torch.tensor([[1.0, 0, 1, 1], [0, 0, 1, 0]]).double()


def twins(estimator: Estimator, model: nn.Module, x: Tensor, replicates: range) -> tuple[Draw, list[Draw]]:
    """The same replicates as one batch, and one at a time."""
    state = memory(estimator, model, x)
    parameters = estimated(estimator, state, trainable(model, state))
    made = Batch([estimator], model, x, [state], parameters).draw(Rng(7, replicates))
    batched = dense(made, 0, parameters)
    return batched, [one(estimator, model, x, Rng(7, r), state, parameters) for r in replicates]


def apart(batched: Draw, singles: list[Draw]) -> float:
    """The largest difference between a batch of replicates and its twins, relative to the tensor's largest gradient."""
    if any(len(g) != len(singles) for g in batched.gradients.values()):
        return float("inf")
    worst = 0.0
    for name, batch in batched.gradients.items():
        alone = torch.stack([single.gradients[name] for single in singles])
        scale = float(alone.abs().max()) or 1.0
        worst = max(worst, float((batch - alone).abs().max()) / scale)
    if batched.log_w is None:
        return worst if all(single.log_w is None for single in singles) else float("inf")
    log_w = torch.stack([single.log_w for single in singles], 1)
    return max(worst, float(((batched.log_w - log_w) / log_w.abs().max()).abs().max()))


def equal(first: dict[str, np.ndarray], second: dict[str, np.ndarray], tolerance: float) -> bool:
    return all(np.abs(first[name] - second[name]).max() <= tolerance * np.abs(first[name]).max() for name in first)


class HighSignal(FunctionToy):
    def __init__(self) -> None:
        Expectation.__init__(self, lambda z: 1e4 * z + z**2 / 2, [0.3, 1.0])


class Shifted(nn.Module):
    """A Gaussian model whose prior mean is a bare parameter."""

    groups = {"generative": ("mu",), "inference": ("encoder",)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.mu, self.encoder = nn.Parameter(torch.tensor([0.3, -0.2])), nn.Linear(2, 2)

    def guide(self, x: Tensor) -> Independent:
        mean = self.encoder(x)
        return Independent(Normal(mean, torch.ones_like(mean)), 1)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        return -0.5 * ((z - self.mu) ** 2 + (x - z) ** 2).sum(-1)


class Convolutional(nn.Module):
    """Images of 4 x 4 pixels, convolutions both ways, and latents that index a table of embeddings on top of them."""

    groups = {"generative": ("table", "up", "scale"), "inference": ("down", "head")}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.down, self.head = nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.Linear(12, 4)
        self.up = nn.ConvTranspose2d(2, 1, 4, stride=2, padding=1)
        self.table = nn.Embedding(2, 8)
        self.scale = nn.Parameter(torch.tensor([0.3]))

    def guide(self, x: Tensor) -> Independent:
        h = self.down(x.reshape(-1, 1, 4, 4)).tanh()
        return Independent(Bernoulli(logits=self.head(h.reshape(*x.shape[:-1], 12)), validate_args=False), 1)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        images = self.table(z.long()).sum(-2)  # [K, *batch, 8]
        images = images.reshape(-1, 2, 2, 2)
        logits = self.up(images).reshape(*z.shape[:-1], 16) * self.scale.exp()
        return Independent(Bernoulli(logits=logits, validate_args=False), 1).log_prob(x) + 0.1 * z.sum(-1)
