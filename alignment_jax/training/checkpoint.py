"""Checkpoints of everything that changes, through orbax."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax

from .state import TrainState


class Checkpointer:
    """Saves (TrainState, position of the data) under workdir/name and restores the newest whole one.

    orbax writes each step into a temporary folder and renames it when it is complete, so that a killed or failed save
    (a full disk) leaves the previous one. `keep` steps are kept; every process of a pod takes part.
    """

    def __init__(self, workdir: str | Path, name: str = "checkpoints", keep: int = 2):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.folder = Path(workdir).absolute() / name
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """The steps that can be restored, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, data_state: dict[str, Any]) -> None:
        """Saves at the state's step; saving a step twice is not an error. Raises OSError naming what is kept."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        plain = state._replace(key=jax.random.key_data(state.key))
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(plain._asdict()), data=self._ocp.args.JsonSave(data_state)
        )
        try:
            self._manager.save(step, args=args)
            self._manager.wait_until_finished()
        except Exception as error:  # orbax and tensorstore raise many kinds; all mean that this step is not on disk
            kept = [s for s in self.steps() if s != step]
            raise OSError(
                f"checkpoint {step} could not be written to {self.folder} ({type(error).__name__}: ...{str(error)[-120:]}). "
                + (f"Step {kept[-1]} is kept: free some space and run the same command again." if kept
                   else "No earlier step is kept: free some space and start again.")
            ) from error  # fmt: skip

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """(state, data_state) of `step` (default: newest) with the shapes and shardings of `like`.

        Raises ValueError naming the folder when the files are damaged, and what can be restored instead.
        """
        step = self.steps()[-1] if step is None else step
        plain = like._replace(key=jax.random.key_data(like.key))._asdict()
        target = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, plain)
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardRestore(target), data=self._ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=args)
        except Exception as error:
            others = [s for s in self.steps() if s != step]
            raise ValueError(
                f"checkpoint {self.folder / str(step)} cannot be read ({type(error).__name__}: {str(error)[:200]}). "
                + (f"Delete that folder to go on from step {others[-1]}." if others else "No other step is kept.")
            ) from error
        state = TrainState(**restored["state"])
        return state._replace(key=jax.random.wrap_key_data(state.key)), dict(restored["data"])

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()


def save_json(path: Path, value: Any) -> None:
    """Writes JSON next to `path` and renames it into place, so that nobody reads half a file."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, default=float))
    temporary.replace(path)


def plain(config: Any) -> Any:
    """A config as the JSON tree that config.json holds."""
    return json.loads(config.to_json_best_effort() if hasattr(config, "to_json_best_effort") else json.dumps(config))
