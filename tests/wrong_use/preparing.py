"""Wrong uses of the tools that prepare and look at files: preprocess, convert, inspect."""

PREPROCESS = ["--input_dataset_file", "{lines}", "--output_path", "{out}", "--vocab_file_path", "{tok}", "--max_length", "40"]
TO_GGUF = ["to-gguf", "--mindspore_path", "{ckpt}", "--output", "{out}"]
QUANTIZE = ["--load_checkpoint", "{ckpt}", "--output_dir", "{out}", "--bits", "4", "--group_size", "16"]
TO_TORCH = ["ms-to-torch", "--mindspore_path", "{ckpt}", "--torch_path", "{out}"]

USES = [
    # preprocess
    ("preprocess", [], ["--input_dataset_file"]),
    ("preprocess", PREPROCESS[2:], ["--input_dataset_file"]),
    ("preprocess", [*PREPROCESS, "--max_len", "4"], ["--max_len"]),
    ("preprocess", [*PREPROCESS[:-1], "many"], ["--max_length", "many"]),
    ("preprocess", [*PREPROCESS[:-1], "0"], ["max_length", "0"]),
    ("preprocess", [*PREPROCESS[:-1], "-3"], ["max_length", "-3"]),
    ("preprocess", [*PREPROCESS, "--overlong", "wrap"], ["--overlong", "wrap"]),
    ("preprocess", [*PREPROCESS, "--eval_share", "1.5"], ["eval_share", "1.5"]),
    ("preprocess", [*PREPROCESS, "--eval_share", "-0.1"], ["eval_share"]),
    ("preprocess", [*PREPROCESS, "--eval_share", "half"], ["--eval_share", "half"]),
    ("preprocess", [*PREPROCESS, "--seed", "x"], ["--seed"]),
    ("preprocess", [*PREPROCESS, "--workers", "0"], ["workers"]),
    ("preprocess", [*PREPROCESS, "--user_token", "<nobody>"], ["--user_token", "<nobody>"]),
    ("preprocess", [*PREPROCESS, "--end_token", "<_bot>"], ["different"]),
    ("preprocess", ["--input_dataset_file", "{absent}", *PREPROCESS[2:]], ["{absent}"]),
    ("preprocess", ["--input_dataset_file", "{empty}", *PREPROCESS[2:]], ["{empty}"]),
    ("preprocess", ["--input_dataset_file", "{nothing}", *PREPROCESS[2:]], ["{nothing}"]),
    ("preprocess", ["--input_dataset_file", "{text}", *PREPROCESS[2:]], ["{text}", "line 1"]),
    ("preprocess", ["--input_dataset_file", "{binary}", *PREPROCESS[2:]], ["{binary}", "UTF-8"]),
    ("preprocess", ["--input_dataset_file", "{lines}:0", *PREPROCESS[2:]], ["weight", "0"]),
    ("preprocess", ["--input_dataset_file", "{lines}:nan", *PREPROCESS[2:]], ["weight"]),
    ("preprocess", ["--input_dataset_file", "{lines}:much", *PREPROCESS[2:]], ["much"]),
    ("preprocess", ["--input_dataset_file", "{lines}:1e9", *PREPROCESS[2:]], ["weight"]),
    ("preprocess", [*PREPROCESS[:4], "--vocab_file_path", "{absent}"], ["{absent}"]),
    ("preprocess", [*PREPROCESS[:4], "--vocab_file_path", "{empty}"], ["{empty}", "tokenizer"]),
    ("preprocess", [*PREPROCESS[:4], "--vocab_file_path", "{text}"], ["{text}"]),
    ("preprocess", [*PREPROCESS[:2], "--output_path", "{text}", *PREPROCESS[4:]], ["{text}"]),
    # inspect
    ("inspect", [], ["directory"]),
    ("inspect", ["{absent}"], ["{absent}"]),
    ("inspect", ["{empty}"], ["{empty}"]),
    ("inspect", ["{text}"], ["{text}"]),
    ("inspect", ["{broken}"], ["{broken}"]),
    ("inspect", ["{torn}"], ["{torn}"]),
    ("inspect", ["{data}", "--samples", "-1"], ["--samples"]),
    ("inspect", ["{data}", "--tokenizer", "{absent}"], ["{absent}"]),
    ("inspect", ["{data}", "--color", "blue"], ["--color"]),
    # quantize
    ("quantize", [], ["--load_checkpoint", "--output_dir", "--bits"]),
    ("quantize", ["--load_checkpoint", "{absent}", *QUANTIZE[2:]], ["{absent}"]),
    ("quantize", ["--load_checkpoint", "{torn}", *QUANTIZE[2:]], ["{torn}"]),
    ("quantize", ["--load_checkpoint", "{adapter}", *QUANTIZE[2:]], ["{adapter}", "LoRA"]),
    ("quantize", [*QUANTIZE[:2], "--output_dir", "{ckpt}", *QUANTIZE[4:]], ["{ckpt}", "another"]),
    ("quantize", [*QUANTIZE[:5], "3", *QUANTIZE[6:]], ["--bits", "3"]),
    ("quantize", [*QUANTIZE[:-1], "32"], ["--group_size 32", "48", "16"]),
    ("quantize", [*QUANTIZE[:-1], "100"], ["--group_size", "100"]),
    ("quantize", [*QUANTIZE, "--samples", "1"], ["--samples"]),
    ("quantize", [*QUANTIZE, "--calibration", "{absent}"], ["{absent}"]),
    ("quantize", [*QUANTIZE, "--calibration", "{nothing}"], ["{nothing}"]),
    ("quantize", [*QUANTIZE, "--calibration", "{text}"], ["{text}", "line 1"]),
    # convert
    ("convert", [], ["COMMAND"]),
    ("convert", ["ms-to-onnx"], ["ms-to-onnx"]),
    ("convert", TO_TORCH[:3], ["--torch_path"]),
    ("convert", [*TO_TORCH, "--format", "onnx"], ["--format", "onnx"]),
    ("convert", [*TO_TORCH, "--dtype", "int8"], ["--dtype", "int8"]),
    ("convert", ["ms-to-torch", "--mindspore_path", "{absent}", "--torch_path", "{out}"], ["{absent}"]),
    ("convert", ["ms-to-torch", "--mindspore_path", "{empty}", "--torch_path", "{out}"], ["{empty}"]),
    ("convert", ["ms-to-torch", "--mindspore_path", "{torn}", "--torch_path", "{out}"], ["{torn}"]),
    ("convert", ["ms-to-torch", "--mindspore_path", "{broken}", "--torch_path", "{out}"], ["{broken}"]),
    ("convert", ["torch-to-ms", "--torch_path", "{absent}", "--mindspore_path", "{out}"], ["{absent}"]),
    ("convert", ["torch-to-ms", "--torch_path", "{empty}", "--mindspore_path", "{out}"], ["{empty}"]),
    ("convert", ["torch-to-ms", "--torch_path", "{empty}", "--mindspore_path", "{out}", "--model_name", "gpt"], ["gpt"]),
    ("convert", ["mindformers-to-ms", "--checkpoint", "{absent}", "--config", "{ckpt}/config.json", "--mindspore_path",
                 "{out}"], ["{absent}"]),
    ("convert", ["mindformers-to-ms", "--checkpoint", "{text}", "--config", "{ckpt}/config.json", "--mindspore_path",
                 "{out}"], ["{text}"]),
    ("convert", ["mindformers-to-ms", "--checkpoint", "{text}", "--config", "{absent}", "--mindspore_path", "{out}"],
     ["{absent}"]),
    # out to other libraries
    ("convert", [*TO_GGUF, "--type", "q3_k"], ["--type", "q3_k", "'f16', 'q8_0', 'q4_0', 'f32'"]),
    ("convert", TO_GGUF[:3], ["--output"]),
    ("convert", [*TO_GGUF[:4], "{empty}"], ["{empty} is a directory"]),
    ("convert", [*TO_GGUF[:4], "{empty}/absent/model.gguf"], ["{empty}/absent/model.gguf cannot be written"]),
    ("convert", ["to-gguf", "--mindspore_path", "{adapter}", "--output", "{out}"], ["{adapter}", "LoRA adapter"]),
    ("convert", ["to-gguf", "--mindspore_path", "{alien}", "--output", "{out}"], ["{alien}/tokenizer.model"]),
    ("convert", ["to-llama", "--mindspore_path", "{ckpt}", "--output_dir", "{ckpt}"], ["{ckpt} is both input and output"]),
    *[("convert", ["merge-lora", "--load_checkpoint", base, "--lora", lora, "--output_dir", "{out}"], words)
      for base, lora, words in (("{ckpt}", "{lora_wide}", ["{lora_wide} is (64, 2)"]), ("{ckpt}", "{lora_alpha}", ["lora_alpha"]),
                                ("{adapter}", "{lora}", ["error: {adapter} is a LoRA adapter (PEFT)"]))],
    # data that would be read in part, or not at all
    *[("preprocess", ["--input_dataset_file", "{" + name + "}", *PREPROCESS[2:]], [f"error: {{{name}}}{said}"]) for name, said in [
        ("system", ", line 2: has a system text, and TeleChat was not trained with one; put it into the question, or give "
                   "--system prepend, which puts it in front of the first question"),
        ("unknown", ', line 2: has the field "context", which is not understood here; remove it, or put what it says into '
                    "the question"),
        ("half", ', line 2: "messages" is empty'), ("utf16", " is not UTF-8 but UTF-16; save the file as UTF-8"),
        ("absent", " cannot be read (No such file or directory); give a JSONL file")]],
    ("preprocess", [*PREPROCESS, "--system", "drop"], ["argument --system: invalid choice: 'drop'"]),
    ("preprocess", [*PREPROCESS[:4], "--vocab_file_path", "{pointer}/model.safetensors"],
     ["error: {pointer}/model.safetensors is a Git LFS pointer, a note of where the file is and not the file itself; fetch it "
      "with `git lfs pull` in the repository, or download the file again"]),
    # directories given by mistake
    *[("convert", ["torch-to-ms", "--torch_path", "{" + name + "}", "--mindspore_path", "{out}"], [f"error: {{{name}}}{said}"])
      for name, said in [
          ("adapter", " is a LoRA adapter (PEFT), the changes to a model and not the model; merge it into its base model first "
                      "(tools/convert.py merge-lora), or give it with --lora beside the base model"),
          ("gguf", " holds GGUF weights (of llama.cpp), q4.gguf; give the directory of the published weights (.bin or "
                   ".safetensors), which GGUF was made from"),
          ("llama", "/config.json is of another model family (llama), not of TeleChat; give the directory of a TeleChat-1, "
                    "TeleChat2 or TeleChat3 model")]],
    ("convert", ["ms-to-torch", "--mindspore_path", "{pointer}", "--torch_path", "{out}"],
     ["error: {pointer}/model.safetensors is a Git LFS pointer, a note of where the file is and not the file itself; fetch it "
      "with `git lfs pull` in the repository, or download the file again"]),
    ("inspect", ["{rundir}"], ["error: {rundir} is the directory of a training run; give a checkpoint in it: "
                               "{rundir}/checkpoint-000100"]),
]
