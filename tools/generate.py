"""Answer prompts or chat: python tools/generate.py --load_checkpoint DIR [--predict_data TEXT]"""

import contextlib
import itertools
import pathlib
import secrets
import signal
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from telechat.cli import ArgumentParser, add_inference_flags, path_argument, run  # noqa: E402
from telechat.errors import InputError  # noqa: E402
from telechat.interrupts import keep_interrupts  # noqa: E402


def main(argv=None):
    arguments = parse_arguments(argv)
    if arguments.input_file and arguments.predict_data is not None:
        raise InputError("give --predict_data or --input_file, not both")
    if arguments.independent and not arguments.input_file:
        raise InputError("--independent goes with --input_file")

    from telechat.config import TeleChatConfig
    from telechat.data.conversation import read_prompts
    from telechat.generation.settings import GenerationSettings

    # Everything that can be wrong with the input shows before the weights are read.
    config = TeleChatConfig.from_pretrained(arguments.load_checkpoint, quantised=True)
    settings = GenerationSettings.load(arguments.load_checkpoint, config)
    questions = read_prompts(arguments.input_file) if arguments.input_file else []
    if arguments.independent and "" in questions:
        raise InputError(f"{arguments.input_file}: prompt {questions.index('') + 1} is empty; leave it out")

    from telechat.adapters.named import attached_bytes
    from telechat.generation.generator import Generator
    from telechat.generation.memory import check_inference_memory, plan_cache, runs_operators
    from telechat.generation.prompt_lookup import check_speculation
    from telechat.generation.session import ChatSession, sampling_params
    from telechat.parallel.inference import load_for_inference
    from telechat.parallel.parallel_config import process_count

    check_speculation("--speculate", arguments.speculate)
    max_length = arguments.max_length or settings.max_length
    batch_size = arguments.batch_size if arguments.independent else 1
    tokens = None
    if max_length > 0:
        shape = cache_shape(arguments, settings, questions, max_length)
        if arguments.cache_memory is not None:
            plan = plan_cache(config, arguments.dtype, shape["slots"], max_length, None, arguments.cache_memory,
                              arguments.max_length is not None, process_count())
            max_length, tokens = plan.length, plan.tokens
            shape.update(cached=tokens, length=min(shape["length"], max_length))
        lower = f"lower --max_length {max_length}" + (f" or --batch_size {batch_size}" if batch_size > 1 else "")
        check_inference_memory(config, arguments.dtype, lower, arguments.ignore_memory, **shape,
                               adapters=attached_bytes(arguments.lora, config),
                               operators=runs_operators(arguments.dtype) and process_count() == 1)
    # Under msrun every process computes; the first one reads and prints.
    model, world = load_for_inference(arguments.load_checkpoint, arguments.dtype, arguments.lora,
                                      False if arguments.no_paged_attention else None)
    terminal = Terminal(world)
    status = 0
    # In a conversation a prompt begins with the one before and its answer.
    talks = not arguments.independent and arguments.predict_data is None
    generator = Generator(model, max_length, batch_size, tokens, not arguments.no_prefix_cache, keep_prefixes=talks,
                          speculate=arguments.speculate)
    seed = terminal.share(arguments.seed if arguments.seed is not None else secrets.randbits(32))
    params = sampling_params(settings, generator, max_new_tokens=arguments.max_new_tokens,
                             temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p,
                             repetition_penalty=arguments.repetition_penalty, seed=seed)
    if arguments.predict_data is not None:
        predict(terminal, generator, settings, params, arguments.predict_data)
    elif arguments.independent:
        status = answer_each(terminal, generator, settings, params, questions)
    elif arguments.input_file:
        session = ChatSession(generator, settings, params)
        for question in questions:
            terminal.print(f"> {question}")
            terminal.show(session.ask(question))
    else:
        chat(terminal, ChatSession(generator, settings, params, honour_leading_marker=False))
    return status


def cache_shape(arguments, settings, questions, max_length):
    """How many sequences of how many tokens are answered at a time at most, and how long their prompts are."""
    from telechat.generation.chat import parse_prompt

    if arguments.predict_data is not None:
        questions = [arguments.predict_data]
    elif not arguments.independent:  # a conversation grows
        return {"slots": 1, "length": max_length, "prompt": max_length}
    prompts = [parse_prompt(settings.tokenizer, question, settings.chat_format) for question in questions]
    longest = min(max(map(len, prompts)), max_length)
    new = arguments.max_new_tokens or settings.longest_answer(max_length)
    length = max(min(longest + new, max_length), 1)
    return {"slots": max(min(arguments.batch_size, len(prompts)), 1) if arguments.independent else 1, "length": length,
            "prompt": longest}


def parse_arguments(argv):
    parser = ArgumentParser(description="Answer prompts, or chat where neither --predict_data nor --input_file is "
                                        "given. Defaults come from the checkpoint's generation_config.json.")
    parser.add_argument("--load_checkpoint", type=path_argument, required=True,
                        help="checkpoint directory with its tokenizer")
    parser.add_argument("--lora", type=path_argument, metavar="DIR",
                        help="LoRA adapter, as the peft package saves it, to answer with: added to the weights, or beside "
                             "quantised ones")
    parser.add_argument("--predict_data", help='one prompt, e.g. "<_user>生抽与老抽的区别？<_bot>"')
    parser.add_argument("--input_file", type=path_argument,
                        help='lines of {"input": "…"}: the turns of one conversation')
    parser.add_argument("--independent", action="store_true", help="the lines of --input_file are separate prompts")
    parser.add_argument("--batch_size", type=int, default=4, help="prompts at a time with --independent; 1 streams them")
    parser.add_argument("--cache_memory", metavar="SIZE",
                        help="key-value cache that all sequences share, e.g. 4GB, in each process; default: room for all "
                             "that are answered at a time")
    parser.add_argument("--max_length", type=int, help="longest sequence, prompt and answer together")
    parser.add_argument("--max_new_tokens", type=int, help="longest answer")
    parser.add_argument("--temperature", type=float, help="0 takes the most likely token")
    parser.add_argument("--top_k", type=int, help="only the k most likely tokens; 0 is off")
    parser.add_argument("--top_p", type=float, help="only the most likely tokens that reach this probability")
    parser.add_argument("--repetition_penalty", type=float, help="1 is off")
    parser.add_argument("--seed", type=int, help="of the random draws")
    add_inference_flags(parser)
    return parser.parse_args(argv)


def predict(terminal, generator, settings, params, text):
    """Answer one prompt whose control tokens are honoured."""
    from telechat.generation.chat import parse_prompt
    from telechat.generation.session import stream_text

    prompt = parse_prompt(settings.tokenizer, text, settings.chat_format)
    terminal.show(stream_text(generator, settings, prompt, params))


def answer_each(terminal, generator, settings, params, questions):
    """Answer separate prompts: streamed one at a time, or several at once and each printed when it is complete.

    Returns:
        int: exit status, 1 where an answer failed; the others are printed all the same.
    """
    from telechat.data.answer_stream import spelt_answer
    from telechat.generation.chat import parse_prompt
    from telechat.generation.session import opens_thought, stream_text

    prompts = [parse_prompt(settings.tokenizer, question, settings.chat_format) for question in questions]
    status = 0
    if generator.batch_size == 1:
        for question, prompt in zip(questions, prompts):
            terminal.print(f"> {question}")
            try:
                terminal.show(stream_text(generator, settings, prompt, params))
            except (ArithmeticError, ValueError) as error:
                status = terminal.complain(question, error)
        return status
    for index, answer, error in generator.answers(prompts, params):
        text = "".join(spelt_answer(settings.tokenizer, settings.chat_format.template, answer,
                                    opens_thought(settings.chat_format, prompts[index])))
        terminal.print(f"> {questions[index]}\n{text}\n")
        if error is not None:
            status = terminal.complain(questions[index], error)
    return status


class Terminal:
    """Input and output of the first process; the others follow it in silence.

    Args:
        world (Group): all processes.
    """

    def __init__(self, world):
        self.world = world
        self.lead = world.rank == 0
        if self.lead and sys.stdin.isatty():
            # From here on input() edits lines: whole characters, arrow keys, the lines before.
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401
        if world.size > 1:
            # An answer broken off in one process would leave the others waiting for it.
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def share(self, value):
        """The first process's value, on all."""
        if self.world.size == 1:
            return value
        from telechat.parallel.collectives import gather_objects
        return gather_objects(value, self.world)[0]

    def print(self, text, end="\n"):
        """Print on the first process."""
        if self.lead:
            print(text, end=end, flush=True)

    def complain(self, question, error):
        """Say on the first process that an answer failed; the exit status of that."""
        if self.lead:
            print(f"error: the answer to {question[:40]!r} failed: {error}", file=sys.stderr, flush=True)
        return 1

    def ask(self):
        """A line typed at the first process; None at the end of input."""
        line = None
        if self.lead:
            try:
                line = input("> ").strip().removeprefix("\ufeff")  # the mark at the front of a file from Windows
            except (EOFError, KeyboardInterrupt):
                print()
        return self.share(line)

    def show(self, pieces):
        """Print text as it comes, then end the line; Ctrl-C ends the answer, not the program."""
        try:
            self._show_two(pieces)
            for piece in pieces:
                self.print(piece, end="")
        except KeyboardInterrupt:
            self.print(" [stopped]", end="")
        finally:
            pieces.close()
        self.print("\n")

    def _show_two(self, pieces):
        """Print the first two pieces together: between them a graph may be compiled, whose bar would wipe out the first."""
        held = []
        try:
            held += itertools.islice(pieces, 1)
            held += itertools.islice(pieces, 1)
        finally:
            self.print("".join(held), end="")


def chat(terminal, session):
    """Multi-turn chat on the terminal."""
    terminal.print("Type a question; /clear starts a new conversation, /exit ends.")
    while True:
        question = terminal.ask()
        if question is None or question == "/exit":
            return
        if question == "/clear":
            session.clear()
            terminal.print("cleared\n")
        elif question:
            try:
                terminal.show(session.ask(question))
            except (ArithmeticError, ValueError) as error:  # an InputError, or the fault of this answer alone
                terminal.print(f"error: {error}\n")


if __name__ == "__main__":
    keep_interrupts()
    run(main)
