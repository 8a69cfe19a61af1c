"""What a checkpoint or dataset directory holds: python tools/inspect.py DIR"""

import os
import pathlib
import sys

if __name__ == "inspect":
    # Python searches a script's own directory first, so where any of the tools, or a library it uses, imports Python's
    # own module of this name, this file is found: it then becomes that module.
    from importlib.machinery import PathFinder
    others = [path for path in sys.path if os.path.abspath(path) != os.path.dirname(os.path.abspath(__file__))]
    PathFinder.find_spec("inspect", others).loader.exec_module(sys.modules["inspect"])
else:
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
    from telechat.cli import ArgumentParser, path_argument, run
    from telechat.errors import InputError


def main(argv=None):
    parser = ArgumentParser(description="Show what a checkpoint or dataset directory holds.")
    parser.add_argument("directory", type=path_argument, help="of a checkpoint, or written by tools/preprocess.py")
    parser.add_argument("--samples", type=int, default=2, help="rows of a dataset to decode")
    parser.add_argument("--statistics", action="store_true",
                        help="read all weights of a checkpoint: mean, deviation, extremes")
    parser.add_argument("--tokenizer", type=path_argument, help="of a dataset, where it has moved: file or directory")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto",
                        help="show in green what the loss counts; otherwise it stands between ⟦ and ⟧")
    arguments = parser.parse_args(argv)
    if arguments.samples < 0:
        raise InputError(f"--samples must be at least 0, not {arguments.samples}")
    names = os.listdir(arguments.directory) if os.path.isdir(arguments.directory) else None
    if names is None:
        raise InputError(f"{arguments.directory} is not a directory; give that of a checkpoint or a dataset")
    color = arguments.color == "always" or arguments.color == "auto" and sys.stdout.isatty()
    if "dataset.json" in names:
        from telechat.inspection import describe_dataset
        lines = describe_dataset(arguments.directory, arguments.samples, arguments.tokenizer, color)
    elif "config.json" in names:
        from telechat.inspection import describe_checkpoint
        lines = describe_checkpoint(arguments.directory, arguments.statistics)
    else:
        from telechat.foreign import refuse_foreign_directory
        refuse_foreign_directory(arguments.directory)
        raise InputError(f"{arguments.directory} holds neither a checkpoint (config.json) nor a dataset (dataset.json)")
    for line in lines:
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    run(main)
