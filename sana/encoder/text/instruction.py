"""The complex human instruction: the text that SANA puts before every prompt so that Gemma reads it as a request.

The published text is data of the released weights and is not part of this project: it is read from an installed
diffusers, or from a file, and recognised by its SHA-256.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

SHA256 = {
    "diffusers": "48290080bb4fd4a264bdc81d0647ac0221359a36506e2b3e954616d6cb48c3da",
    "published_yaml": "62b9ab89eebb0ac5ee4d264bf96bf19d2b81f504bc3852500efeaf5a34d638b1",
}
"""Of the joined text as diffusers has it (single quotes) and as the published training files have it (double)."""


def read_instruction(source: str | None) -> str | None:
    """The instruction named by `source`, ready to be put before a prompt.

    Args:
        source: None for none; "diffusers" for the default of diffusers' SanaPipeline; "published_yaml" for the form of
            the published training files, which has other quotation marks; else a file: YAML with a list of lines (at
            the top, under `chi_prompt`, or under `text_encoder.chi_prompt` as in the published training files), or
            plain text, taken verbatim but for one final newline.

    Raises:
        ValueError: diffusers' text is not the published one, or the file is missing, empty or of another form.
        ModuleNotFoundError: diffusers, which holds the text, is not installed.
    """
    if source is None:
        return None
    if source in SHA256:
        text = _from_diffusers(source)
        if source == "published_yaml":
            text = text.replace("'", '"')
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest != SHA256[source]:
            raise ValueError(
                f"instruction {source!r}: the installed diffusers has another text (SHA-256 {digest[:12]}, expected "
                f"{SHA256[source][:12]}); released weights need the published one, give it as a file"
            )
        return text
    return _from_file(Path(source).expanduser())


def _from_diffusers(name: str) -> str:
    """Default of `complex_human_instruction`, read from the source so that no pipeline has to be imported."""
    spec = importlib.util.find_spec("diffusers")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"instruction {name!r} needs the package diffusers: pip install diffusers, or give a file with the text"
        )
    source = Path(spec.submodule_search_locations[0]) / "pipelines" / "sana" / "pipeline_sana.py"
    if not source.is_file():
        raise ValueError(f"instruction {name!r}: the installed diffusers has no SanaPipeline; 0.38 or later has it")
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == "__call__":
            names = [a.arg for a in node.args.args]
            defaults: Sequence[ast.expr | None] = [None] * (len(names) - len(node.args.defaults)) + node.args.defaults
            for name, default in zip(names, defaults, strict=True):
                if name == "complex_human_instruction" and default is not None:
                    return "\n".join(ast.literal_eval(default))
    raise ValueError(f"instruction {name!r}: SanaPipeline.__call__ has no default complex_human_instruction")


def _from_file(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"instruction {str(path)!r}: no such file; expected None, 'diffusers', or a YAML or text file")
    text = path.read_text()
    if path.suffix in (".yaml", ".yml"):
        import yaml

        content = yaml.safe_load(text)
        if isinstance(content, dict):
            content = content.get("text_encoder", content)
            content = content.get("chi_prompt") if isinstance(content, dict) else None
        if not isinstance(content, list) or not all(isinstance(line, str) for line in content):
            raise ValueError(f"instruction {str(path)!r}: expected a list of lines, at the top or as chi_prompt")
        text = "\n".join(content)
    else:
        text = text.removesuffix("\n")
    if not text:
        raise ValueError(f"instruction {str(path)!r}: the text is empty; use None for no instruction")
    return text
