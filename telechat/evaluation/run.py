"""An evaluation from beginning to end, which goes on where an earlier one was broken off."""

import dataclasses
import json
import math
import os

from telechat.content import first_difference
from telechat.data.conversation import read_conversations, read_prompts
from telechat.data.encoding import IGNORED, encode_conversation
from telechat.data.json_lines import in_file, read_records
from telechat.errors import InputError
from telechat.evaluation.forward import Forward
from telechat.evaluation.multiple_choice import BENCHMARKS, LETTERS, build_prompts, letter_ids
from telechat.evaluation.prompts import PromptLogits
from telechat.parallel.collective_errors import run_on_all
from telechat.fields import shown
from telechat.parallel.collectives import gather_objects
from telechat.progress import Progress
from telechat.text_files import decode, parse_json, read_json_object


class Results:
    """Lines of JSON that one evaluation has written, each under a key; kept as they come.

    Args:
        directory (str): where ``answers.jsonl`` and ``evaluation.json`` are.
        identity (dict): what is evaluated and how, as `telechat.evaluation.identity.identify` gives it.
        world (Group): the processes that evaluate together; the first one reads and writes.

    Raises:
        InputError: the directory holds another evaluation, or cannot be written.
    """

    def __init__(self, directory, identity, world):
        self.path = os.path.join(directory, "answers.jsonl")
        self.records, self._file = {}, None
        run_on_all(lambda: self._open(directory, identity) if world.rank == 0 else None, world)
        # All must agree on what is left to do.
        self.records = gather_objects(self.records, world)[0]

    def _open(self, directory, identity):
        about = os.path.join(directory, "evaluation.json")
        if os.path.exists(about):
            earlier = read_json_object(about, "give another --output_dir, or remove it")
            for key in identity:
                found = first_difference(key, earlier.get(key), identity[key])
                if found:
                    name, before, here = found
                    raise InputError(f"{directory} holds an evaluation with another {name} ({shown(before)} there, "
                                     f"{shown(here)} here); give another --output_dir, or remove it")
            self._read()
        else:
            os.makedirs(directory, exist_ok=True)
            if os.path.exists(self.path):
                raise InputError(f"{self.path} is there and nothing says of what model; give another --output_dir, or "
                                 "remove it")
            with open(about + ".partial", "w", encoding="utf-8") as file:
                json.dump(identity, file, ensure_ascii=False, indent=2)
            os.replace(about + ".partial", about)
        self._file = open(self.path, "a", encoding="utf-8")

    def _read(self):
        if not os.path.exists(self.path):
            return
        complete = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break  # cut short by a crash
                record = in_file(self.path, f"line {number}", _answer, line)
                self.records[record["key"]] = record
                complete += len(line)
        os.truncate(self.path, complete)

    def add(self, key, **record):
        """Keep what was found out about ``key``."""
        self.records[key] = {"key": key, **record}
        if self._file:
            self._file.write(json.dumps(self.records[key], ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self):
        """Close the file."""
        if self._file:
            self._file.close()


def evaluate_choices(task, directory, split, model, settings, results, shots=5, batch_size=4, say=print,
                     cache_tokens=None):
    """Accuracy in multiple choice.

    Args:
        task (str): "ceval" or "mmlu".
        directory (str): the benchmark's, with ``dev/`` and ``split``.
        split (str): "val" or "test".
        model: a `TeleChat` or this process's part of one.
        settings (GenerationSettings): tokenizer and chat format.
        results (Results): gets every answer.
        shots (int): worked examples in front of a question.
        batch_size (int): questions at a time.
        say (callable): takes a line of progress.

    Returns:
        dict: "subjects": name → {"questions", "correct", "accuracy"} (accuracy None where the file tells no
        answers), "accuracy": the mean over subjects, "accuracy_of_questions": over all questions.
    """
    benchmark = BENCHMARKS[task]
    logits_of = PromptLogits(model, cache_tokens)
    letters, before = letter_ids(settings.tokenizer)
    max_length = model.config.training_seqlen - len(before)
    subjects = benchmark.subjects(directory, split)
    questions = {subject: benchmark.read(directory, split, subject) for subject in subjects}
    examples = {subject: benchmark.read(directory, "dev", subject)[:shots] if shots else [] for subject in subjects}
    scores = {}
    for subject in subjects:
        waiting = [question for question in questions[subject] if f"{subject}/{question.number}" not in results.records]
        # Of like length together, so that little is filled up.
        prompts = build_prompts(benchmark, settings, subject, examples[subject], waiting, max_length)
        order = sorted(range(len(waiting)), key=lambda place: len(prompts[place]))
        with Progress(subject, len(order), "questions") as progress:
            for first in range(0, len(order), batch_size):
                chosen = order[first:first + batch_size]
                logits = logits_of([prompts[place] + before for place in chosen])[:, letters]
                for place, row in zip(chosen, logits):
                    results.add(f"{subject}/{waiting[place].number}", answer=LETTERS[int(row.argmax())],
                                correct=waiting[place].answer, logits=[round(float(value), 4) for value in row])
                progress.advance(len(chosen))
        scores[subject] = _score(subject, questions[subject], results)
        say(describe(subject, scores[subject]))
    known = [score for score in scores.values() if score["accuracy"] is not None]
    correct, asked = (sum(score[name] for score in known) for name in ("correct", "questions"))
    return {"subjects": scores,
            "accuracy": sum(score["accuracy"] for score in known) / len(known) if known else None,
            "accuracy_of_questions": correct / asked if asked else None}


def longest_prompt(task, directory, split, settings, shots, limit):
    """How many tokens the longest question of a benchmark has with its worked examples, at most ``limit``, and how many
    questions there are; arguments as of `evaluate_choices`."""
    benchmark, longest, count = BENCHMARKS[task], 0, 0
    for subject in benchmark.subjects(directory, split):
        questions = benchmark.read(directory, split, subject)
        examples = benchmark.read(directory, "dev", subject)[:shots] if shots else []
        prompts = build_prompts(benchmark, settings, subject, examples, questions, limit)
        longest, count = max([longest, *map(len, prompts)]), count + len(prompts)
    return longest, count


def _score(subject, questions, results):
    answers = [results.records[f"{subject}/{question.number}"]["answer"] for question in questions]
    if not questions or not all(question.answer for question in questions):
        return {"questions": len(questions), "correct": None, "accuracy": None}
    correct = sum(answer == question.answer for answer, question in zip(answers, questions))
    return {"questions": len(questions), "correct": correct, "accuracy": correct / len(questions)}


def describe(subject, score):
    """A line of the table."""
    accuracy = "    –" if score["accuracy"] is None else f"{score['accuracy']:6.1%}"
    return f"{subject[:48]:48s} {score['questions']:6d} {accuracy:>7s}"


def evaluate_perplexity(sequences, model, results, batch_size=4, say=print):
    """Loss a token and perplexity.

    Args:
        sequences (Sequences): of a file, from `read_sequences`.
        model: a `TeleChat` or this process's part of one.
        results (Results): gets the loss of every sequence.
        batch_size (int): sequences at a time.
        say (callable): takes a line of progress.

    Returns:
        dict: "sequences", "cut", "tokens", "loss" (mean cross entropy a token), "perplexity".
    """
    forward = Forward(model)
    pairs = sequences.pairs
    waiting = sorted((number for number in range(len(pairs)) if str(number) not in results.records),
                     key=lambda number: len(pairs[number][0]))
    for first in range(0, len(waiting), batch_size):
        chosen = waiting[first:first + batch_size]
        with Progress(f"sequences {first + 1} to {first + len(chosen)} of {len(waiting)}"):
            losses, counts = forward.losses(*zip(*(pairs[number] for number in chosen)))
        for number, loss, count in zip(chosen, losses, counts):
            results.add(str(number), loss=float(loss), tokens=int(count))
        say(f"{min(first + batch_size, len(waiting))} of {len(waiting)} sequences")
    loss, tokens = (sum(results.records[str(number)][name] for number in range(len(pairs)))
                    for name in ("loss", "tokens"))
    mean = loss / tokens
    # exp of 700 is about the largest number there is.
    perplexity = math.exp(mean) if mean < 700 else float("inf")
    return {"sequences": len(pairs), "cut": sequences.cut, "tokens": tokens, "loss": mean, "perplexity": perplexity}


@dataclasses.dataclass(frozen=True)
class Sequences:
    """What a JSONL file is scored by: ``pairs`` of (ids, labels), lists of int, and how many of them were ``cut``."""

    pairs: list
    cut: int


def read_sequences(path, settings, longest, system="refuse"):
    """The sequences of a file for `evaluate_perplexity`.

    Lines are conversations as for fine-tuning, whose answers and end tokens count, or {"text": "…"}, where all
    tokens but the first count. Control tokens spelt in a text are text.

    Args:
        path (str): the file.
        settings (GenerationSettings): tokenizer and chat format.
        longest (int): tokens; what is longer is cut off behind.
        system (str): what becomes of a system text, as in `parse_conversation`.

    Raises:
        InputError: names the file and the line; or nothing of it counts.
    """
    pairs = _encoded(path, settings, system)
    cut = sum(len(ids) > longest for ids, _ in pairs)
    pairs = [(ids[:longest], labels[:longest]) for ids, labels in pairs]
    if not any(label != IGNORED for _, labels in pairs for label in labels[1:]):
        raise InputError(f"{path} holds no token that counts")
    return Sequences(pairs, cut)


def _encoded(path, settings, system):
    """(ids, labels) of every line."""
    tokenizer, chat_format = settings.tokenizer, settings.chat_format
    first = read_records(path)[0][1]
    if not isinstance(first, dict) or "text" not in first:
        spellings = tuple(tokenizer.id_to_token(index) for index in (chat_format.user, chat_format.bot))
        return [encode_conversation(tokenizer, chat_format, turns)
                for turns in read_conversations(path, spellings, system, chat_format.template)]
    pairs = []
    for number, text in enumerate(read_prompts(path, "text"), start=1):
        ids = tokenizer.encode(text, control_tokens=False)
        if len(ids) < 2:
            raise InputError(f"{path}, text {number}: must have at least two tokens")
        pairs.append((ids, ids))
    return pairs


def _answer(line):
    """A line of ``answers.jsonl``: a letter, or the loss of a sequence."""
    record = parse_json(decode(line))
    is_record = isinstance(record, dict) and isinstance(record.get("key"), str)
    if not is_record or not (isinstance(record.get("answer"), str) or (
            isinstance(record.get("loss"), (int, float)) and isinstance(record.get("tokens"), int))):
        raise InputError("is no answer of an evaluation; give another --output_dir, or remove the file")
    return record
