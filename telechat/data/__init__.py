"""Data: tokenizers, conversations, packing, and the MindRecord datasets that training reads."""

from telechat.data.conversation import ChatFormat, parse_conversation, read_conversations, read_prompts
from telechat.data.encoding import encode_conversation, encode_conversations
from telechat.data.mindrecord import write_dataset
from telechat.data.mixture import MixtureFile, parse_mixture_file, read_mixture
from telechat.data.packed_dataset import PackedDataset
from telechat.data.packing import Packing
from telechat.data.preprocess import preprocess
from telechat.data.text_stream import TextStream
from telechat.data.tokenizer import Tokenizer

__all__ = ["ChatFormat", "MixtureFile", "PackedDataset", "Packing", "TextStream", "Tokenizer",
           "encode_conversation", "encode_conversations", "parse_conversation", "parse_mixture_file", "preprocess",
           "read_conversations", "read_mixture", "read_prompts", "write_dataset"]
