"""Turn fine-tuning conversations into a packed MindRecord dataset.

    python tools/preprocess.py --input_dataset_file multi_turn_example.jsonl --output_path dataset \\
        --vocab_file_path checkpoint/tokenizer.model --max_length 1024
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from telechat.cli import ArgumentParser, path_argument, run  # noqa: E402
from telechat.data.conversation import ChatFormat  # noqa: E402
from telechat.data.preprocess import preprocess  # noqa: E402
from telechat.data.mixture import parse_mixture_file  # noqa: E402
from telechat.data.tokenizer import Tokenizer  # noqa: E402
from telechat.progress import track  # noqa: E402


def main(argv=None):
    parser = ArgumentParser(description="Turn fine-tuning conversations into a packed MindRecord dataset.")
    parser.add_argument("--input_dataset_file", nargs="+", required=True, metavar="FILE[:WEIGHT]",
                        help='JSONL files of {"input": "<_user>…<_bot>…<_user>…", "output": "…"}, or in the form of '
                             "Alpaca, ShareGPT, OpenAI or TeleChat2's publisher; a weight says how many times a file is "
                             "taken: 2 twice, 0.5 a random half")
    parser.add_argument("--output_path", type=path_argument, required=True, help="directory to write the dataset to")
    parser.add_argument("--vocab_file_path", type=path_argument, required=True,
                        help="tokenizer.model, tokenizer.json, or a directory with one of them")
    parser.add_argument("--max_length", type=int, default=2048, help="sequence length of the model")
    for role in ("start", "user", "bot", "end", "pad"):
        parser.add_argument(f"--{role}_token", help="default: that of the model the tokenizer belongs to")
    parser.add_argument("--seed", type=int, default=2024, help="of the shuffle")
    parser.add_argument("--overlong", choices=("drop", "truncate"), default="drop",
                        help="what to do with conversations of more than max_length tokens")
    parser.add_argument("--eval_share", type=float, default=0.0,
                        help="share of the conversations to hold out for evaluation")
    parser.add_argument("--system", choices=("refuse", "prepend"), default="refuse",
                        help="what becomes of a system text: TeleChat was trained without; prepend puts it in front of "
                             "the first question, as in tools/serve.py")
    parser.add_argument("--workers", type=int, help="threads that tokenise; default: one a processor")
    args = parser.parse_args(argv)

    tokenizer = Tokenizer.from_pretrained(args.vocab_file_path)
    chat_format = ChatFormat.for_tokenizer(tokenizer, args.start_token, args.user_token, args.bot_token,
                                           args.end_token, args.pad_token)
    sources = [parse_mixture_file(argument) for argument in args.input_dataset_file]
    info = preprocess(sources, tokenizer, args.output_path, args.max_length, chat_format, args.seed,
                      args.overlong, args.eval_share, args.workers, _progress, args.system)
    for name in ("train", "eval"):
        if info[name]:
            print(f"{name}: " + _summary(info[name]))
    print(f"{args.output_path}: rows of {args.max_length + 1} tokens")


def _progress(conversations, total):
    return track(conversations, "tokenising", "conversations", total)


def _summary(counts):
    text = (f"{counts['conversations']:,} conversations in {counts['packs']:,} packs, "
            f"{counts['tokens']:,} tokens, {counts['label_tokens']:,} of them learnt, "
            f"{counts['padding_share']:.1%} padding")
    for name, what in (("dropped", "dropped as longer than max_length"),
                       ("truncated", "cut to max_length")):
        if counts[name]:
            text += f"; {counts[name]:,} {what}"
    return text


if __name__ == "__main__":
    run(main)
