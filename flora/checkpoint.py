"""Checkpoints of an adapter: asynchronous, sharded, whole or not at all by Orbax.

    with Checkpointer("/checkpoints/run1", max_to_keep=3) as checkpointer:
        if checkpointer.latest() is not None:
            adapted, state, start = checkpointer.restore(adapted, state)
        ...
        checkpointer.save(step, adapted, state)     # writes while training goes on

A, B, leaves that train whole and the optimizer's state are saved; of the base only a
fingerprint.
"""

import contextlib
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from flora._files.atomic import steadily
from flora._files.compare import (
    FORMAT,
    base_problems,
    checksum,
    compared,
    description,
    json_of,
    leaf_problems,
    moved_problems,
    record_problems,
    some,
    state_problems,
)
from flora._files.fingerprint import fingerprint, no_values
from flora._files.items import (
    base_leaves,
    copied,
    filled,
    is_empty,
    is_sharded,
    items_of,
    moments_of,
    placed,
    saved_too,
    sharding_of,
    unlike,
    unsavable,
)
from flora._files.parsed import of_later
from flora._tree.checks import require_adapted
from flora._tree.errors import LoraError, LoraTypeError, fail
from flora._tree.finite import require_finite
from flora._tree.paths import Pattern, check_pattern, named_leaves
from flora._tree.weight import is_node

T = TypeVar("T")
_TRASH = "deleted"  # steps are renamed into it, which is atomic, and then removed


class Restored(NamedTuple):
    """What `Checkpointer.restore` returns."""

    adapted: Any
    state: Any
    step: int


class Checkpointer:
    """Saves and restores A, B, `Trained` leaves, batch statistics and the state.

    The base is never written; a fingerprint of it is.  A step appears under its name
    once it is complete, by one rename, so that whatever kills a process leaves the
    steps saved before.  With several processes, all of them make the same calls on one
    shared directory.

    Args:
      directory: where the steps lie: a local path, or a URL that Orbax knows, such as
        `gs://bucket/run1`.  Made by the first `save`.
      max_to_keep: how many of the latest steps stay, `None` for all.
      also: a pattern of other frozen leaves that training changes all the same.  They
        are saved whole, and are no part of the base.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, flora, flora.checkpoint
      >>> fn = lambda p, x: x @ p["kernel"]
      >>> params, x = {"kernel": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> config = flora.LoraConfig(rank=2)
      >>> adapted = flora.init(jax.random.key(0), config, fn, params, x)
      >>> with flora.checkpoint.Checkpointer(tempfile.mkdtemp()) as checkpointer:
      ...     checkpointer.save(10, adapted)
      ...     restored = checkpointer.restore(adapted)
      >>> a = restored.adapted["kernel"].a
      >>> restored.step, bool((a == adapted["kernel"].a).all())
      (10, True)
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_to_keep: int | None = 3,
        also: Pattern = (),
    ) -> None:
        if not isinstance(directory, str | os.PathLike) or not os.fspath(directory):
            raise LoraTypeError(
                f"Checkpointer: directory={directory!r}. Write a path, such as "
                "'/checkpoints/run1'."
            )
        if max_to_keep is not None and not (_is_int(max_to_keep) and max_to_keep > 0):
            raise LoraError(
                f"Checkpointer: max_to_keep={max_to_keep!r}. "
                "Write an int of at least 1, or None to keep all."
            )
        check_pattern("also", also)
        path = os.fspath(directory)
        self._directory = path if "://" in path else os.path.abspath(path)
        if os.path.isfile(self._directory):
            raise LoraError(f"Checkpointer: {path} is a file. Pass a directory.")
        self._max_to_keep, self._also = max_to_keep, also
        self._manager: ocp.CheckpointManager | None = None
        self._writes = False
        # Fingerprints of the base as it was last; None: those of the latest step.
        self._base: dict[str, str] | None = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for the save under way, and lets go of Orbax's threads."""
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.close()
            if self._writes:
                _empty_trash(manager)
        self._writes = False

    def save(
        self,
        step: int,
        adapted: Any,
        state: Any = None,
        *,
        metadata: Mapping[str, Any] | None = None,
        allow_nonfinite: bool = False,
        check_base: bool = True,
    ) -> None:
        """Saves a step; returns once its arrays are copied, and writes meanwhile.

        A run that diverged is refused, or its steps would rotate the good ones away:
        NaN and infinity in A, B, leaves that train whole, those of `also`, and what the
        optimizer keeps for each of them.  Its other numbers may be infinite, as a best
        loss is at the start.

        The arrays can be donated or changed afterwards.  A save that is still under way
        is waited for first, and what it raised is raised here.  A base that is not the
        one of the step before is refused: an optimizer without `flora.optimizer` moves
        it, and the adapter then fits no base that is kept anywhere.  Saved as step 0,
        before training, the start is what all later steps are compared with.

        Args:
          step: a number above those saved.
          adapted: the adapted tree, base and all.
          state: the optimizer's state: any tree of arrays and Python numbers.
          metadata: anything that JSON holds, for `Checkpointer.metadata`.
          allow_nonfinite: True to save NaN and infinity all the same.
          check_base: False where the base changed on purpose, as it does in
            `flora.recipes.restart`.

        Raises:
          LoraError: the step is saved or passed already, the directory holds
            checkpoints of others, the base changed, or a leaf cannot be saved or holds
            NaN or infinity.
        """
        _require_step(step)
        record, items = _snapshot(adapted, state, self._also, allow_nonfinite)
        manager = self._open(writes=True)
        self._require_new(int(step), manager)
        if check_base:
            self._require_same_base(adapted, record["base"], manager)
        record |= {"step": int(step), "metadata": json_of(metadata)}
        record |= {"sha256": checksum(record)}
        args = {k: ocp.args.PyTreeSave(v) for k, v in items.items() if v}
        manager.save(
            int(step),
            args=ocp.args.Composite(flora=ocp.args.JsonSave(record), **args),
            force=True,
        )
        self._base = record["base"]
        _empty_trash(manager)

    def wait(self) -> None:
        """Returns once the last save is on disk; raises what went wrong with it."""
        if self._manager is not None:
            self._manager.wait_until_finished()

    def steps(self) -> tuple[int, ...]:
        """The steps on disk, in order; waits for the save under way."""
        self.wait()
        manager = self._open(writes=False)
        _listed(manager.reload)
        return tuple(sorted(map(int, manager.all_steps())))

    def latest(self) -> int | None:
        """The last of `steps()`, or `None`."""
        return max(self.steps(), default=None)

    def metadata(self, step: int | None = None) -> Any:
        """What `save` was given as `metadata`; of the latest step unless told."""
        return self._of_step(step, lambda step: self._record(step)["metadata"])

    def delete(self, step: int) -> None:
        """Removes a step, such as one to go back behind.

        Raises:
          LoraError: there is no such step, or it is no checkpoint of flora's.
        """
        step = self._choose(step)
        self._record(step)
        manager = self._open(writes=True)
        manager.delete(step)
        _empty_trash(manager)

    def restore(
        self,
        adapted: Any,
        state: Any = None,
        *,
        step: int | None = None,
        check_base: bool = True,
    ) -> Restored:
        """The adapted tree with the saved adapter on its base, the state, the step.

        Args:
          adapted: a tree with the same factors as the saved one, in any sharding: what
            is read gets its shardings.  Factors and `Trained` leaves can be
            `ShapeDtypeStruct`s; the base is needed and shared with the result.
          state: what the optimizer's state looks like, `tx.init(adapted)` or the
            `jax.eval_shape` of it; `None` to leave it.
          step: which; the latest unless told.
          check_base: False to put the adapter on another base: one in another dtype, or
            a `ShapeDtypeStruct`.

        Returns:
          `Restored(adapted, state, step)`.  Dropout keys belong to one step: it has
          none.

        Raises:
          LoraError: there is no such step, or leaves, layouts, ranks, alphas, shapes,
            dtypes, the base or the state are not those that were saved; every such leaf
            is named.
        """
        require_adapted(adapted, "restore")
        return self._of_step(
            step, lambda step: self._restored(step, adapted, state, check_base)
        )

    def _restored(
        self, step: int, adapted: Any, state: Any, check_base: bool
    ) -> Restored:
        saved = self._record(step)
        also = saved_too(self._also, adapted, known=saved["leaves"])
        items = items_of(adapted, state, also)
        given = description(adapted, items, also)
        problems = [
            *leaf_problems(compared(saved), compared(given)),
            *state_problems(saved["state"], given["state"], step),
        ]
        if check_base:
            base = base_leaves(adapted, also)
            absent = [p for path, x in base.items() for p in no_values(path, x)]
            free = {p for p, x in named_leaves(adapted)[0] if not is_node(x)}
            problems += absent or base_problems(saved["base"], base, free)
        fail(f"Step {step}: {p}" for p in problems)
        tree, state = filled(adapted, state, self._read(step, items, saved))
        self._base = saved["base"] if check_base else {}
        return Restored(tree, state, step)

    # --- Orbax ---------------------------------------------------------------------

    def _open(self, *, writes: bool) -> ocp.CheckpointManager:
        """Orbax's manager; one that only reads leaves what others write alone."""
        if self._manager is not None and (self._writes or not writes):
            return self._manager
        if writes:  # old steps will be removed: not those of others
            found = self._open(writes=False)
            ours = {step: _is_ours(found, step) for step in found.all_steps()}
            fail(_not_ours(found, step) for step in ours if not ours[step])
            self.close()
        policy = ocp.checkpoint_managers.LatestN(self._max_to_keep)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            create=writes,
            cleanup_tmp_directories=writes,
            save_root_metadata=False,
            single_host_load_and_broadcast=True,
            todelete_subdir=_TRASH,
        )
        try:
            self._manager = _listed(
                lambda: ocp.CheckpointManager(self._directory, options=options)
            )
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise LoraError(
                f"{self._directory} cannot be read by Orbax: {error} If files of a "
                "step are damaged, remove that step."
            ) from error
        self._writes = writes
        return self._manager

    def _require_new(self, step: int, manager: ocp.CheckpointManager) -> None:
        steps = manager.all_steps()
        if steps and step <= max(steps):
            raise LoraError(
                f"save: step={step}, but {self._directory} holds steps {some(steps)}. "
                "Steps go up. Write to another directory, or take back the later ones "
                "with Checkpointer.delete(step)."
            )

    def _require_same_base(
        self, adapted: Any, given: dict[str, str], manager: ocp.CheckpointManager
    ) -> None:
        """Raises where a frozen leaf is not what it was at the step before."""
        if self._base is None and manager.latest_step() is not None:
            self._base = self._record(self._choose(None))["base"]
        if self._base:
            base = base_leaves(adapted, self._also)
            fail(f"save: {p}" for p in moved_problems(self._base, given, base))

    def _choose(self, step: int | None) -> int:
        """The step, or the latest; raises unless it is there."""
        if step is not None:
            _require_step(step)
        steps = self.steps()
        if step in steps or (step is None and steps):
            return steps[-1] if step is None else int(step)
        wanted = "no checkpoint" if step is None else f"no step {step}"
        path = self._open(writes=False).directory
        found = sorted(x.name for x in path.iterdir()) if path.exists() else []
        holds = f"steps {some(steps)}" if steps else some(found) if found else "nothing"
        raise LoraError(
            f"{self._directory} has {wanted}: it holds {holds}. Pass the directory "
            "that Checkpointer(directory).save wrote to, and one of its steps."
        )

    def _of_step(self, step: int | None, read: Callable[[int], T]) -> T:
        """What `read` gives of a step that stays in its place meanwhile.

        Another process that saves may remove the latest step as it is read: then there
        is a later one.
        """
        tries = 20
        while True:
            tries, chosen = tries - 1, self._choose(step)
            where = pathlib.Path(self._directory, str(chosen))
            try:
                return steadily([where], functools.partial(read, chosen))
            except (LoraError, OSError, ValueError):  # Orbax's own, where it is gone
                if not tries or step is not None or chosen in self.steps():
                    raise

    def _record(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays."""
        manager = self._open(writes=False)
        if not _is_ours(manager, step):
            raise LoraError(_not_ours(manager, step))
        args = ocp.args.Composite(flora=ocp.args.JsonRestore())
        record = self._orbax_restore(step, args)["flora"]
        if isinstance(record, dict) and (later := of_later(record, FORMAT)):
            raise LoraError(f"Step {step} of {self._directory} {later}")
        wrong = record_problems(record)
        if not wrong and record.get("sha256", found := checksum(record)) != found:
            wrong = "its checksum is another"
        if wrong:
            raise LoraError(self._unreadable(step, f"its record is damaged: {wrong}."))
        return record

    def _read(
        self, step: int, items: dict[str, dict[str, Any]], saved: dict[str, Any]
    ) -> dict[str, Any]:
        """The arrays of each item, as the given leaves look."""
        wanted = {
            item: {k: x for k, x in leaves.items() if not is_empty(x)}
            for item, leaves in items.items()
        }
        args = {
            item: ocp.args.PyTreeRestore(
                item={k: 0 for k in leaves},
                restore_args={k: _restore_args(x) for k, x in leaves.items()},
            )
            for item, leaves in wanted.items()
            if leaves
        }
        read = self._orbax_restore(step, ocp.args.Composite(**args)) if args else {}
        fail(
            self._unreadable(step, f"'{item}' differs from its record in {p}")
            for item in args
            for p in unlike(read[item], wanted[item])
        )
        values = saved.get("values", {})  # those of before had none
        fail(
            self._unreadable(step, f"'{item}' of '{path}' has changed.")
            for item in args
            if item in values
            for path, was in fingerprint(read[item]).items()
            if was != values[item].get(path)
        )
        return {
            item: {
                k: placed(x, None if is_empty(x) else read[item][k])
                for k, x in leaves.items()
            }
            for item, leaves in items.items()
        }

    def _orbax_restore(self, step: int, args: Any) -> Any:
        manager = self._open(writes=False)
        try:
            return manager.restore(step, args=args)
        except Exception as error:  # Orbax and what is below it raise many classes
            first = str(error).strip().split("\n")[0]
            what = f"{type(error).__name__}: {first}"
            raise LoraError(self._unreadable(step, what)) from error

    def _unreadable(self, step: int, what: str) -> str:
        others = some(self._open(writes=False).all_steps())
        return (
            f"Step {step} of {self._directory} cannot be read: {what} If its files are "
            f"damaged, pass another step of {others}."
        )


def _listed(read: Callable[[], T]) -> T:
    """What lists the steps, once more if another process removed one meanwhile."""
    for _ in range(20):
        # Between two looks at a step Orbax finds that it is no directory any more.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return read()
    return read()


def _is_ours(manager: ocp.CheckpointManager, step: int) -> bool:
    return (manager.directory / str(step) / "flora").exists()


def _not_ours(manager: ocp.CheckpointManager, step: int) -> str:
    return (
        f"{manager.directory / str(step)} is no checkpoint of flora's. "
        "Pass a directory of its own, such as '/checkpoints/run1/adapter'."
    )


def _empty_trash(manager: ocp.CheckpointManager) -> None:
    trash = manager.directory / _TRASH
    if jax.process_index() == 0 and trash.exists():
        for path in trash.iterdir():
            path.rmtree(missing_ok=True)


# --- What is saved -------------------------------------------------------------------


def _snapshot(
    adapted: Any, state: Any, also: Pattern, allow_nonfinite: bool
) -> tuple[dict, dict]:
    """What JSON keeps, and copies or arrays for Orbax."""
    require_adapted(adapted, "save")
    also = saved_too(also, adapted)
    items = items_of(adapted, state, also)
    fail(
        p
        for item, leaves in items.items()
        for path, x in leaves.items()
        for p in unsavable(path if item == "whole" else f"{item} of {path}", x)
    )
    trained = {
        path if item == "whole" else f"{item} of {path}": x
        for item, leaves in items.items()
        if item != "state"
        for path, x in leaves.items()
    }
    require_finite("save", trained | moments_of(state), allow_nonfinite)
    record = description(adapted, items, also)
    arrays = {
        item: {k: copied(x) for k, x in leaves.items() if not is_empty(x)}
        for item, leaves in items.items()
    }
    record |= {
        "base": fingerprint(base_leaves(adapted, also)),
        "values": {item: fingerprint(leaves) for item, leaves in arrays.items()},
    }
    return record, arrays


def _restore_args(x: Any) -> ocp.RestoreArgs:
    if is_sharded(x):
        return ocp.ArrayRestoreArgs(sharding=sharding_of(x))
    return ocp.RestoreArgs(restore_type=np.ndarray)


# --- Arguments -----------------------------------------------------------------------


def _is_int(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def _require_step(step: Any) -> None:
    if not _is_int(step) or step < 0:
        raise LoraTypeError(
            f"step={step!r}. Write an int of 0 or more; a counter on the device needs "
            "int(step)."
        )
