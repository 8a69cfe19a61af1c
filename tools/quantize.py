"""Quantise a checkpoint: python tools/quantize.py --load_checkpoint DIR --output_dir DIR --bits 4 --calibration FILE"""

import functools
import pathlib
import shlex
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from telechat.cli import ArgumentParser, path_argument, run  # noqa: E402
from telechat.errors import InputError  # noqa: E402
from telechat.interrupts import keep_interrupts  # noqa: E402


def main(argv=None):
    arguments = parse_arguments(argv)
    if arguments.samples < 2 or arguments.max_length < 2:
        raise InputError("--samples and --max_length must be at least 2")

    from telechat.quantization.quantise import quantise

    size, perplexity = quantise(arguments.load_checkpoint, arguments.output_dir, arguments.bits, arguments.group_size,
                                functools.partial(read_calibration, arguments) if arguments.calibration else None,
                                functools.partial(print, flush=True), arguments.pad_ffn)
    if perplexity is not None:
        print(f"perplexity of {perplexity.tokens:,} tokens that were held out: {perplexity.before:.4f} before, "
              f"{perplexity.after:.4f} after ({perplexity.after / perplexity.before - 1:+.2%})")
    print(f"wrote {size / 1e6:,.1f} MB of weights to {arguments.output_dir}")
    print(f"next: python tools/generate.py --load_checkpoint {shlex.quote(arguments.output_dir)}")


def read_calibration(arguments, config):
    """The sequences of a file of texts or conversations that are quantised with: (ids, labels) each, from all over it."""
    from telechat.evaluation.run import read_sequences
    from telechat.generation.settings import GenerationSettings

    settings = GenerationSettings.load(arguments.load_checkpoint, config)
    found = read_sequences(arguments.calibration, settings, min(arguments.max_length, config.training_seqlen),
                           arguments.system).pairs
    step = max(len(found) / arguments.samples, 1)
    chosen = [found[int(place * step)] for place in range(min(arguments.samples, len(found)))]
    print(f"GPTQ with {len(chosen)} of {len(found)} sequences of {arguments.calibration}; a layer's errors are those of "
          "its products' outputs, ‖(W − Ŵ)X‖² / ‖WX‖²")
    return chosen


def parse_arguments(argv):
    parser = ArgumentParser(description="Quantise the products of a checkpoint's blocks to 8 or 4 bits, a layer at a time, and "
                                        "write them as AutoGPTQ does, which generate, serve and evaluate read as others do. "
                                        "With --calibration by GPTQ (arXiv:2210.17323), else rounded to the nearest.")
    parser.add_argument("--load_checkpoint", type=path_argument, required=True, help="checkpoint directory of ours")
    parser.add_argument("--output_dir", type=path_argument, required=True, help="directory to write")
    parser.add_argument("--bits", type=int, required=True, help="8 or 4")
    parser.add_argument("--group_size", type=int, default=128, help="inputs that share a scale; -1: a whole row")
    parser.add_argument("--pad_ffn", action="store_true",
                        help="widen the feed-forward layers by zeros to a multiple of the group size, where it does not divide "
                             "their width; the model computes the same")
    parser.add_argument("--calibration", type=path_argument, metavar="FILE",
                        help="JSONL of conversations, as for training, or of texts; every tenth is held out for the perplexity")
    parser.add_argument("--samples", type=int, default=128, help="sequences of it that are used, from all over the file")
    parser.add_argument("--max_length", type=int, default=2048, help="tokens; what is longer is cut off behind")
    parser.add_argument("--system", choices=("refuse", "prepend"), default="refuse",
                        help="what becomes of a system text, as in tools/preprocess.py")
    return parser.parse_args(argv)


if __name__ == "__main__":
    keep_interrupts()
    run(main)
