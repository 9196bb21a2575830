"""Build the API reference from the docstrings; a warning ends it.

python tools/write_api_reference.py site

Needs pdoc: `pip install -e ".[docs]"`.
"""

import argparse
import pkgutil
import warnings
from pathlib import Path

import anima_peft


def write(folder: Path) -> None:
    """Write the pages of `anima_peft` and of all modules below it to `folder`.

    Raises:
        Warning: a module cannot be imported, or an annotation cannot be resolved.
    """
    import pdoc  # here, so that --help needs no extra

    pdoc.render.configure(docformat="google", footer_text=f"anima_peft {anima_peft.__version__}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # torch's, while transformers' and diffusers' lazy modules are imported
        warnings.filterwarnings("ignore", ".*torch.jit.script.*", DeprecationWarning)
        for pattern in (
            # Fields that PEFT's configs hand down are annotated with names of PEFT's modules.
            r"Error parsing type annotation .*\.(LoKr|Lora)Config\.",
            # A NamedTuple's annotations are looked up in pdoc's own module.
            r"Error parsing type annotation ForwardRef\(.*miniature\..*Question",
            # Where a package lists its names in __all__, pdoc stops there; elsewhere it has gone on by itself.
            "The module specification .* has already been added",
        ):
            warnings.filterwarnings("ignore", pattern, UserWarning)
        modules = [module.name for module in pkgutil.walk_packages(anima_peft.__path__, "anima_peft.")]
        pdoc.pdoc("anima_peft", *modules, output_directory=folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="folder for the pages; made if missing")
    write(parser.parse_args().folder)
