"""The tutorials' YAML files as ours: PaddleSlim's Compressor, and PaddleClas.

What is converted is taken out of the old settings; all that is left in the end is reported, so
nothing is lost silently.
"""

from pathlib import Path

from onnxslim_kd import recipe
from onnxslim_kd.convert_clas import clas
from onnxslim_kd.convert_common import Converted, leaves, unshared
from onnxslim_kd.convert_compressor import compressor
from onnxslim_kd.errors import UserError


def convert(path: Path) -> Converted:
    """Convert a Compressor or PaddleClas file.

    Raises:
        UserError: The file cannot be read, or is neither.
    """
    old = unshared(recipe.included(path))
    for mark, kind in (("compressor", compressor), ("compress_pass", compressor), ("Arch", clas)):
        if mark in old:
            new = Converted({"title": path.stem})
            try:
                kind(old, new)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                # a list where settings are expected, or a word where a number is
                raise UserError(f"{path}: is not built as such files are: {error}") from error
            new.notes += [f"not carried over: {left}" for left in leaves(old)]
            try:
                recipe.parse(new.settings, path.stem)
            except UserError as error:
                new.notes.append(f"before the new file runs, mend this: {error}")
            return new
    raise UserError(
        f"{path}: is neither a Compressor file (with `compressor`) nor one of PaddleClas (with"
        f" `Arch`); it has {', '.join(map(str, old)) or 'nothing'}"
    )
