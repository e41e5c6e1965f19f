"""One run of an experiment, in a process of its own: `python -m pldr.study.run RECIPE DIVERGED`.

A run whose numbers are no longer finite is a result: it is written down as JSON in the file DIVERGED. Every other failure
is a failure of this process.
"""

import sys

from pldr.files import write_json
from pldr.recipe import load_recipe
from pldr.training.run import train


def main(recipe: str, diverged: str) -> None:
    try:
        train(load_recipe(recipe), overwrite=True, progress=False)
    except FloatingPointError as error:
        write_json(diverged, {"message": str(error)})


if __name__ == "__main__":
    main(*sys.argv[1:])
