"""The states of the random generators that a training draws from, as tensors that a checkpoint can hold."""

import math
import random
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pldr.files import one_line

# Of the Mersenne twister, which Python and NumPy share: its words, then the place of the next one.
_WORDS = 624


def random_file(rank: int) -> str:
    """The name of a process's file in a checkpoint."""
    return f"random-{rank}.safetensors"


def save_random_states(file: Path) -> None:
    """
    Raises:
        OSError: it can not be written.
    """
    try:
        save_file(_states(), file)
    except SafetensorError as error:
        raise OSError(f"{file}: could not be written ({error})") from None


def read_random_states(file: Path) -> dict[str, torch.Tensor]:
    """
    Returns:
        By generator what `set_random_states` takes: "python" and "numpy" (int64 [625]), "gauss" (float64 [2], the normal
        number that each of the two holds back, NaN for none), "torch" (uint8) and, of a run on a GPU, "cuda" (uint8).

    Raises:
        OSError: the file can not be read.
        ValueError: it holds something else (named with the file).
    """
    try:
        states = load_file(file)
        known = _states()
        for name in known.keys() - {"cuda"} | states.keys() & known.keys():
            if states[name].shape != known[name].shape or states[name].dtype != known[name].dtype:
                raise ValueError(f"{name}: {states[name].dtype}, {tuple(states[name].shape)}")
        for name in ("python", "numpy"):
            words = states[name].tolist()
            if not all(0 <= word < 1 << 32 for word in words) or words[-1] > _WORDS:
                raise ValueError(f"{name}: no state of its generator")
        for name, device in (("torch", "cpu"), ("cuda", "cuda")):
            if name in states.keys() & known.keys():
                torch.Generator(device).set_state(states[name])
    except KeyError as error:
        raise ValueError(f"{file}: holds no random state {error}") from None
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file}: damaged random states ({one_line(error)})") from None
    return states


def set_random_states(states: dict[str, torch.Tensor]) -> None:
    """Let the generators go on from states that `read_random_states` gave."""
    gauss = [None if math.isnan(value) else value for value in states["gauss"].tolist()]
    random.setstate((3, tuple(states["python"].tolist()), gauss[0]))
    *words, place = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(words, np.uint32), place, int(gauss[1] is not None), gauss[1] or 0.0))
    torch.random.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _states() -> dict[str, torch.Tensor]:
    _, python, held = random.getstate()
    numpy = np.random.get_state(legacy=False)
    gauss = [math.nan if held is None else held, numpy["gauss"] if numpy["has_gauss"] else math.nan]
    states = {
        "python": torch.tensor(python, dtype=torch.int64),
        "numpy": torch.tensor([*numpy["state"]["key"].tolist(), numpy["state"]["pos"]], dtype=torch.int64),
        "gauss": torch.tensor(gauss, dtype=torch.float64),
        "torch": torch.random.get_rng_state(),
    }
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
