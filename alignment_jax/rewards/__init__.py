"""Rewards by name, and the judges that have the last word."""

from collections.abc import Callable

from .base import Reward
from .combine import weighted
from .critters import Judge, critters_fragile, critters_gold, critters_proxy
from .jpeg import jpeg_compressibility, jpeg_incompressibility

REWARDS: dict[str, Callable[[], Reward]] = {
    "critters_proxy": critters_proxy,
    "critters_fragile": critters_fragile,
    "jpeg_compressibility": jpeg_compressibility,
    "jpeg_incompressibility": jpeg_incompressibility,
}
JUDGES: dict[str, Callable[[], Judge]] = {"critters_gold": critters_gold}

__all__ = ["JUDGES", "REWARDS", "Judge", "Reward", "weighted"]
