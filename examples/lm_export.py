"""What a fine-tuned language model is written as, and the proof that it is whole."""

import argparse
import pathlib
import shutil
from typing import Any

import jax
from language_models import hf_llama
from language_models.llama import Llama

import flora
import flora.hf
import flora.peft


def export(args: argparse.Namespace, model: Llama, adapted: Any) -> int:
    """Writes the adapter for flora and, of factors, for PEFT, and the merged model.

    Args:
      args: `out`, `checkpoint` and `merge` of `finetune_lm.py`.
      model: the decoder.
      adapted: the tree.

    Returns:
      The bytes of the adapter's file.
    """
    out, names = pathlib.Path(args.out), {"scan": model.scan}
    adapter = out / "adapter.safetensors"
    flora.save(adapter, adapted)
    if _has_factors(adapted):
        flora.peft.save(
            out / "peft",
            adapted,
            names=hf_llama.peft_names(model.config, **names),
            base_model_name_or_path=args.checkpoint,
            task_type="CAUSAL_LM",
        )
    if args.merge:
        tensors = hf_llama.tensors(model.config, **names)
        _as_checkpoint(out / "merged", adapted, tensors, pathlib.Path(args.checkpoint))
    return adapter.stat().st_size


def _has_factors(adapted: Any) -> bool:
    def is_factored(x: Any) -> bool:
        return isinstance(x, flora.LoraWeight)

    return any(map(is_factored, jax.tree.leaves(adapted, is_leaf=is_factored)))


def _as_checkpoint(
    folder: pathlib.Path, adapted: Any, tensors: Any, source: pathlib.Path
) -> None:
    beside = [  # config, tokenizer, template
        path
        for path in source.iterdir()
        if path.suffix in (".json", ".jinja", ".txt") and "safetensors" not in path.name
    ]
    if not all(_same(path, folder / path.name) for path in beside):
        (folder / "config.json").unlink(missing_ok=True)  # without it, no model
    flora.hf.save(folder, flora.merge(adapted), tensors)
    for path in sorted(beside, key=lambda path: path.name == "config.json"):
        new = folder / f".{path.name}.new"
        shutil.copy(path, new)
        new.replace(folder / path.name)


def _same(one: pathlib.Path, other: pathlib.Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()
