"""Multiple choice with worked examples: C-Eval (arXiv:2305.08322) and MMLU (arXiv:2009.03300).

The published directories are read as they are: ``dev/<subject>_dev.csv`` holds the examples,
``val/`` or ``test/`` the questions. The wording is that of the official repository's ``evaluation/``; the
examples are turns of a chat, and the answer is the likeliest of A, B, C and D as the next token.
"""

import csv
import dataclasses
import os

from telechat.errors import InputError
from telechat.evaluation.ceval_subjects import SUBJECTS
from telechat.generation.chat import build_prompt

LETTERS = ("A", "B", "C", "D")


@dataclasses.dataclass(frozen=True)
class Question:
    """One question; ``answer`` is a letter, or "" where the file does not tell."""

    number: str  # its id in the file, or its place
    text: str
    choices: tuple
    answer: str


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What differs between the two."""

    name: str
    header: bool  # whether the CSV files name their columns
    split: str  # where the questions with known answers are

    def describe(self, subject):
        """The line in front of a question."""
        if self.name == "ceval":
            return f"以下是中国关于{SUBJECTS.get(subject, subject)}考试的单项选择题，请选出其中的正确答案。"
        # Underscores and the space before the full stop are the official script's.
        return f"There is a single choice question about {subject} . Answer the question by replying A, B, C or D."

    def ask(self, subject, question):
        """A question as the user's message."""
        choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices))
        if self.name == "ceval":
            return f"{self.describe(subject)}\n\n{question.text}\n{choices}\n答案："
        return f"{self.describe(subject)}\nQuestion: {question.text}\n{choices}\nAnswer: "

    def subjects(self, directory, split):
        """Names of the subjects of a split, sorted.

        Raises:
            InputError: there is none.
        """
        folder, ending = os.path.join(directory, split), f"_{split}.csv"
        names = sorted(name[:-len(ending)] for name in _list(folder) if name.endswith(ending))
        if not names:
            raise InputError(f"{folder} holds no file *{ending}; give --data the directory that holds dev/, val/ "
                             "and test/")
        return names

    def read(self, directory, split, subject):
        """The questions of a subject's file.

        Raises:
            InputError: the file cannot be read, or a line is not a question with four choices.
        """
        path = os.path.join(directory, split, f"{subject}_{split}.csv")
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                lines = list(csv.reader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{path} cannot be read ({reason})") from None
        columns = {name: place for place, name in enumerate(("question", *LETTERS, "answer"))}
        if self.header:
            columns = {name: place for place, name in enumerate(lines.pop(0) if lines else ())}
            missing = [name for name in ("question", *LETTERS) if name not in columns]
            if missing:
                raise InputError(f"{path}: the first line lacks the columns {', '.join(missing)}")
        return [self._question(path, number, line, columns) for number, line in enumerate(lines) if line]

    def _question(self, path, number, line, columns):
        fields = {name: line[place].strip() for name, place in columns.items() if place < len(line)}
        answer = fields.get("answer", "").upper()
        if any(name not in fields for name in ("question", *LETTERS)) or answer not in (*LETTERS, ""):
            raise InputError(f"{path}, question {number + 1}: must be a question, four choices and an answer "
                             "from A to D")
        return Question(fields.get("id", str(number)), fields["question"],
                        tuple(fields[letter] for letter in LETTERS), answer)


BENCHMARKS = {"ceval": Benchmark("ceval", True, "val"), "mmlu": Benchmark("mmlu", False, "test")}


def build_prompts(benchmark, settings, subject, examples, questions, max_length):
    """Token ids of each question after the worked examples; the oldest are dropped where all do not fit."""
    history = []
    for example in examples:
        history += [{"role": "user", "content": benchmark.ask(subject, example)},
                    {"role": "bot", "content": example.answer}]
    return [build_prompt(settings.tokenizer, history, benchmark.ask(subject, question), max_length,
                         settings.chat_format, honour_leading_marker=False, fit=True) for question in questions]


def letter_ids(tokenizer):
    """Ids of A, B, C and D at the beginning of an answer, and the ids that all four begin with before them.

    Raises:
        InputError: the tokenizer does not tell the letters apart by one token.
    """
    encoded = [tokenizer.encode(letter, control_tokens=False) for letter in LETTERS]
    common = 0
    while all(len(ids) > common + 1 and ids[common] == encoded[0][common] for ids in encoded):
        common += 1
    ids = [ids[common] for ids in encoded]
    if len(set(ids)) < len(LETTERS):
        raise InputError(f"{tokenizer.path} has no token of their own for A, B, C and D; "
                         "multiple choice cannot be scored with it")
    return ids, encoded[0][:common]


def _list(folder):
    try:
        return os.listdir(folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}); give --data the directory that holds "
                         "dev/, val/ and test/") from None
