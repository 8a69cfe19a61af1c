"""Convert checkpoints: published torch weights or MindFormers' files to ours, and ours back to torch."""

import json
import os
import pathlib
import shlex
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from telechat.cli import ArgumentParser, path_argument, run  # noqa: E402


def parse_arguments(argv):
    from telechat.checkpoint.convert import MODEL_NAMES
    from telechat.checkpoint.gguf_export import TYPES

    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = add_command(commands, "torch-to-ms", "published torch weights (.bin or .safetensors) to ours")
    command.add_argument("--torch_path", type=path_argument, required=True,
                         help="directory of config.json and the torch weights")
    command.add_argument("--mindspore_path", type=path_argument, required=True, help="directory to write")
    command.add_argument("--model_name", choices=MODEL_NAMES,
                         help="only checked: the model is recognised from its config.json and tensor names")

    command.add_argument("--dequantize", action="store_true",
                         help="read weights that AutoGPTQ quantised to 4 or 8 bits, and write ordinary ones")

    command = add_command(commands, "ms-to-torch", "ours to the published names and layout")
    command.add_argument("--mindspore_path", type=path_argument, required=True, help="directory of ours")
    command.add_argument("--torch_path", type=path_argument, required=True, help="directory to write")
    command.add_argument("--format", choices=("bin", "safetensors"), default="bin", help="of the weights")

    command = commands.add_parser("merge-lora", help="add a LoRA adapter to a checkpoint of ours",
                                  description="Add a LoRA adapter, as the peft package saves it, to a checkpoint of ours.")
    command.add_argument("--load_checkpoint", type=path_argument, required=True, help="directory of ours, its base model")
    command.add_argument("--lora", type=path_argument, required=True, help="directory of the adapter")
    command.add_argument("--output_dir", type=path_argument, required=True, help="directory to write")

    command = commands.add_parser("to-llama", help="ours to a LlamaForCausalLM directory, for transformers, vLLM and others",
                                  description="Write a checkpoint of ours as a LlamaForCausalLM directory, which "
                                              "transformers, vLLM and others read without our code.")
    command.add_argument("--mindspore_path", type=path_argument, required=True, help="directory of ours")
    command.add_argument("--output_dir", type=path_argument, required=True, help="directory to write")

    command = commands.add_parser("to-gguf", help="ours to a GGUF file, for llama.cpp and what is built on it",
                                  description="Write a checkpoint of ours as one GGUF file with its tokenizer and chat "
                                              "template, which llama.cpp and what is built on it read.")
    command.add_argument("--mindspore_path", type=path_argument, required=True, help="directory of ours")
    command.add_argument("--output", type=path_argument, required=True, help="file to write, as model.gguf")
    command.add_argument("--type", choices=TYPES, default="f16", help="of the matrices; f16 if left out")

    command = add_command(commands, "mindformers-to-ms", "a file of MindFormers' TeleChat converter to ours")
    command.add_argument("--checkpoint", type=path_argument, required=True,
                         help="the .ckpt file that holds the whole model")
    command.add_argument("--config", type=path_argument, required=True, help="the model's published config.json")
    command.add_argument("--mindspore_path", type=path_argument, required=True, help="directory to write")
    command.add_argument("--mp", type=int, default=1,
                         help="52B: the --mp that the file was converted with, or the model_parallel it was "
                              "trained with; a wrong number goes unnoticed and garbles the model")
    return parser.parse_args(argv)


def add_command(commands, name, description):
    from telechat.checkpoint.dtypes import NAMES

    command = commands.add_parser(name, help=description, description=description)
    command.add_argument("--dtype", choices=NAMES, help="cast to this; if left out, tensors keep their dtype")
    return command


def main(argv=None):
    # MindSpore is imported here, where Ctrl-C is one word, and not above.
    from telechat.checkpoint import convert
    from telechat.checkpoint.gguf_export import to_gguf
    from telechat.checkpoint.llama import to_llama

    arguments = vars(parse_arguments(argv))
    command = arguments.pop("command")
    if command == "to-llama":
        size, notes = to_llama(**arguments)
        print(f"wrote {size / 1e6:,.1f} MB of weights to {arguments['output_dir']}")
        print("\n".join(f"note: {note}" for note in notes))
        return
    if command == "to-gguf":
        size, notes = to_gguf(**arguments)
        print(f"wrote {size / 1e6:,.1f} MB to {arguments['output']}")
        print("\n".join(f"note: {note}" for note in notes))
        return
    convert_files = {"torch-to-ms": convert.torch_to_ms, "ms-to-torch": convert.ms_to_torch,
                     "mindformers-to-ms": convert.mindformers_to_ms, "merge-lora": convert.merge_lora}[command]
    size = convert_files(**arguments)
    to_torch = command == "ms-to-torch"
    target = arguments["torch_path" if to_torch else "output_dir" if command == "merge-lora" else "mindspore_path"]
    size = f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
    print(f"wrote {size} of weights to {target}")
    print("next:", next_command(target, to_torch))


def next_command(target, to_torch):
    if to_torch:
        return (f"copy the published *.py files to {target}, then in Python: "
                f'transformers.AutoModelForCausalLM.from_pretrained({json.dumps(target, ensure_ascii=False)}, trust_remote_code=True)')
    command = f"python tools/generate.py --load_checkpoint {shlex.quote(target)}"
    if not any(os.path.isfile(os.path.join(target, name)) for name in ("tokenizer.model", "tokenizer.json")):
        return f"copy the published tokenizer.model or tokenizer.json to {target}, then: {command}"
    return command


if __name__ == "__main__":
    run(main)
