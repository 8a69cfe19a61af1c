"""From fine-tuning files to a dataset directory, in one call."""

import os

from telechat.data.conversation import ChatFormat
from telechat.data.encoding import encode_conversations
from telechat.data.mindrecord import check_writable, write_dataset
from telechat.data.mixture import read_mixture
from telechat.data.model_template import check_folder
from telechat.data.packing import Packing, check_settings


def preprocess(sources, tokenizer, output_path, max_length, chat_format=None, seed=2024, overlong="drop",
               eval_share=0.0, workers=None, progress=None, system="refuse"):
    """Tokenise, pack and write conversations; everything is checked before anything is written.

    Args:
        sources: list of `MixtureFile`.
        tokenizer: `Tokenizer`.
        output_path: dataset directory, made or replaced.
        max_length: the model's sequence length; a row holds one id more.
        chat_format: `ChatFormat`; None: that of the model the tokenizer belongs to.
        seed: of the shuffle, of the held-out part and of fractional weights.
        overlong: "drop" or "truncate", see `Packing`.
        eval_share: see `read_mixture`.
        workers: see `encode_conversations`.
        progress: function (iterator over conversations, their number) → iterator, such as tqdm.
        system: what becomes of a system text, see `parse_conversation`.

    Returns:
        the content of ``dataset.json``.

    Raises:
        InputError: bad input; nothing is written then.
    """
    check_folder(tokenizer)
    chat_format = chat_format or ChatFormat.for_tokenizer(tokenizer)
    tokens = chat_format.tokens(tokenizer)
    # What no data can make good is refused before the data is read.
    check_settings(max_length, overlong)
    check_writable(output_path)
    mixture = read_mixture(sources, seed, eval_share, (tokens["user"]["token"], tokens["bot"]["token"]), system,
                           chat_format.template)
    encoded = encode_conversations(tokenizer, chat_format, mixture.conversations, workers)
    encoded = list(progress(encoded, len(mixture.conversations)) if progress else encoded)
    splits = {name: Packing(encoded, order, max_length, chat_format.pad, overlong)
              for name, order in (("train", mixture.train), ("eval", mixture.evaluation)) if order}
    settings = {
        "max_length": max_length,
        "seed": seed,
        "overlong": overlong,
        "eval_share": eval_share,
        "sources": [{"file": os.path.basename(source.path), "weight": source.weight} for source in sources],
        "tokens": tokens,
        "tokenizer": {"file": tokenizer.file_name, "path": os.path.abspath(tokenizer.path), "sha256": tokenizer.sha256,
                      "vocab_size": tokenizer.vocab_size},
    }
    return write_dataset(output_path, splits, settings)
