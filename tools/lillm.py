"""lilLM's whole path, small, on this machine's CPU: tokenizer, three trainings, export, a conversation.

Each command is shown before it runs, and can be repeated by itself.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalite.config.load import load_run
from megalite.tokenizer.load import load_tokenizer
from tools.journey import (
    ROOT,
    JourneyError,
    Script,
    build_parser,
    check_loss_fell,
    exit_with,
    make_room,
    read_metric,
    run_folder,
    say,
    tell_end,
    tokenize,
    travel,
)
from tools.replies import (
    MAX_NEW_TOKENS,
    Question,
    check_answers,
    check_form,
    check_hedging,
    count_hedged,
    find_replies,
)

PRETRAINING, FINE_TUNING, PREFERENCES = "chat_1m", "chat_1m_sft", "chat_1m_dpo"  # in configs/
NUM_PROCESSES = 2
NUM_STAGES = 10
MIN_LOSS_DROP = 5.0
MIN_RIGHT = 0.8  # of the held-out questions; a blind guess among the answers of its kind is right in 0.04
MIN_ACCURACY = 0.75  # of the held-out pairs; a coin's is 0.5
SAME_MARGIN = 1e-3  # of the model and itself: rewards are differences of float32 sums
MESSAGES = (
    "Hello!",
    "What is the capital of Japan?",
    "How much is 8 plus 7?",
    "Can you tell me the opposite of early?",
    "Thank you!",
)

WRITE = "python tools/write_lessons.py --output {run}/corpus {limit}"
TRAIN = """deepspeed --quiet --num_gpus {num_processes} {port} launchers/{launcher}.py
    --deepspeed_config configs/deepspeed/{name}.json --config configs/runs/{name}.yaml"""
PRETRAIN = f"""{TRAIN} data.train={{run}}/corpus/lessons_text_document data.tokenizer={{run}}/tokenizer
    output_dir={{run}}/pretrained {{length}} {{warmup}} {{validation}}"""
TUNE = f"""{TRAIN} checkpoint.start_from={{run}}/{{start}} data.train={{train}}
    data.validation={{held_out}} output_dir={{run}}/{{output}}
    {{length}} {{warmup}} {{validation}}"""
ASK = f"""python tools/generate.py --checkpoint {{run}}/{{output}} --chat --prompt - --temperature 0
    --max-new-tokens {MAX_NEW_TOKENS} --batch-size 64"""
EXPORT = """python tools/convert_to_hf.py
    --checkpoint {run}/preferred --output {run}/exported --dtype float32 --verify"""
CHAT = "python tools/generate.py --checkpoint {run}/exported --chat --temperature 0"

EPILOG = """\
The model reads texts that state 382 facts, such as sums, capitals and opposites, learns to answer from
conversations on four facts of five, and from pairs of answers on these not to begin with "I think". The
questions at the end are on the others, which it read of, but which no conversation or pair speaks of. All of
it is made by tools/write_lessons.py: nothing is downloaded. A folder that an earlier chat wrote is replaced.

example:
  python tools/lillm.py --output runs/short --steps 300 --min-loss-drop 3 --min-right 0 --min-accuracy 0.5
"""
CONTENTS = """\
  corpus/                   texts, conversations, pairs of answers, held-out questions
  tokenizer/                loads with transformers.AutoTokenizer
  pretrained/ tuned/ preferred/   the three runs: metrics.png and .jsonl, checkpoints/, config.yaml
  exported/                 with its chat template, loads with transformers.AutoModelForCausalLM"""
COMMANDS = """\
  python tools/generate.py --checkpoint {run}/exported --chat --temperature 0
  python tools/convert_to_hf.py --checkpoint {run}/preferred --output {run}/adapter --adapter"""


def teach_and_talk(arguments: argparse.Namespace) -> None:
    """All of it, from first to last. Raises JourneyError when a command fails or a promise is broken."""
    folder = run_folder(arguments.output)
    script = Script(
        NUM_STAGES,
        NUM_PROCESSES,
        run=folder,
        text="lessons",
        limit=f"--max-bytes={arguments.corpus_bytes}" if arguments.corpus_bytes else "",
        vocab_size=load_run(str(ROOT / f"configs/runs/{PRETRAINING}.yaml"), []).model.vocab_size,
        **short_run(arguments.steps),
    )
    make_room(arguments.output, "chat")
    script.stage("Lessons: texts about a small world, conversations, pairs of answers")
    script.run(WRITE)
    tokenize(script)
    learned = [
        pretrain(script, folder, arguments.min_loss_drop),
        fine_tune(script, folder),
        prefer(script, folder, arguments.min_accuracy),
    ]
    script.stage("Hugging Face: export, load with transformers, compare")
    script.run(EXPORT)
    learned.append(answer(script, folder, arguments.min_right))
    converse(script, folder)
    script.stage("Pictures of all curves")
    for run in ("pretrained", "tuned", "preferred"):
        script.run("python tools/plot_run.py {run}/{output}", output=run)
    tell_end(script, CONTENTS, COMMANDS, learned)


def short_run(num_steps: int | None) -> dict[str, str]:
    """What makes the three runs as long as that, each an override of theirs; None leaves them as they are."""
    if num_steps is None:
        return dict.fromkeys(("length", "warmup", "validation"), "")
    return {
        "length": f"schedule.num_steps={num_steps}",
        "warmup": f"schedule.warmup_steps={max(1, num_steps // 20)}",
        "validation": f"logging.validate_every_steps={max(1, num_steps // 4)}",
    }


# The stages that promise something


def pretrain(script: Script, folder: Path, min_loss_drop: float) -> str:
    """A line on the loss."""
    script.stage("Pre-training on the texts: data parallel 2, ZeRO-1")
    script.run(PRETRAIN, launcher="pretrain", name=PRETRAINING)
    line = check_loss_fell(read_metric(folder / "pretrained", "loss"), min_loss_drop)
    say(line)
    return f"pre-training: {line}"


def fine_tune(script: Script, folder: Path) -> str:
    """A line on the loss on conversations about facts that were held out."""
    script.stage("Fine-tuning on the conversations: tensor parallel 2, sequence parallel")
    corpus = folder / "corpus"
    script.run(
        TUNE,
        launcher="finetune",
        name=FINE_TUNING,
        start="pretrained",
        # Half of it the model has read before: it is not to forget what no conversation asks for.
        train=f"[0.5,{corpus}/chats.jsonl,0.5,{corpus}/lessons.jsonl]",
        held_out=f"{corpus}/chats_held_out.jsonl",
        output="tuned",
    )
    line = check_validation_fell(read_metric(folder / "tuned", "validation_loss"))
    say(line)
    return f"fine-tuning: {line}"


def prefer(script: Script, folder: Path, min_accuracy: float) -> str:
    """A line on margins, and on the held-out pairs."""
    script.stage("Preference tuning on the pairs: DPO of adapters, 2 pipeline stages")
    corpus = folder / "corpus"
    script.run(
        TUNE,
        launcher="prefer",
        name=PREFERENCES,
        start="tuned",
        train=f"{corpus}/pairs.jsonl",
        held_out=f"{corpus}/pairs_held_out.jsonl",
        output="preferred",
    )
    margins = read_metric(folder / "preferred", "rewards/margins")
    accuracy = read_metric(folder / "preferred", "validation_rewards/accuracies")[-1]
    line = check_preferences(margins, accuracy, min_accuracy)
    say(line)
    return f"preferences: {line}"


def answer(script: Script, folder: Path, min_right: float) -> str:
    """A line on the answers to the held-out questions, before and after preference tuning."""
    script.stage("The held-out questions, of which no conversation spoke")
    corpus = folder / "corpus"
    lines = (ROOT / corpus / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    questions: list[Question] = [json.loads(line) for line in lines]
    tokenizer = load_tokenizer(str(ROOT / folder / "tokenizer"))
    told, hedged = [], []
    for output in ("tuned", "exported"):
        printed = script.run(ASK, stdin=corpus / "questions.txt", shows=False, output=output)
        replies = find_replies(printed, len(questions))
        check_form(replies, [len(tokenizer.encode(reply)) for reply in replies])
        told.append(check_answers(questions, replies, min_right))
        hedged.append(count_hedged(replies))
        say(f"{output}: {told[-1]}")
    check_hedging(*hedged)
    return f"held-out questions: {told[0]}; after preference tuning {told[1]}"


def converse(script: Script, folder: Path) -> None:
    """Show a conversation. JourneyError unless each message has its answer, on one line."""
    script.stage("A conversation with the exported model")
    messages = folder / "messages.txt"
    (ROOT / messages).write_text("".join(f"{message}\n" for message in MESSAGES), encoding="utf-8")
    replies = script.run(CHAT, stdin=messages, shows=False).splitlines()
    for message, reply in zip_longest(MESSAGES, replies, fillvalue=""):
        say(f"you>   {message}\nmodel> {reply}")
    if len(replies) != len(MESSAGES):
        raise JourneyError(f"{len(replies)} lines of answers to {len(MESSAGES)} messages")


# What the promises are checked with


def check_validation_fell(losses: Sequence[float]) -> str:
    """A line on the losses of validation. JourneyError unless the last is below the first."""
    text = f"loss {losses[0]:.2f} at the first validation, {losses[-1]:.2f} at the last, on held-out facts"
    if not losses[-1] < losses[0]:
        raise JourneyError(f"{text}: a loss that falls was promised")
    return text


def check_preferences(margins: Sequence[float], accuracy: float, min_accuracy: float) -> str:
    """A line on margins and accuracy. JourneyError unless margins rise from 0 and the accuracy is enough."""
    text = (
        f"margin of the rewards {margins[0]:.2f} at step 1, {margins[-1]:.2f} at the last; "
        f"{accuracy:.0%} of the held-out pairs told right"
    )
    if not (abs(margins[0]) <= SAME_MARGIN < margins[-1] and accuracy >= min_accuracy):
        raise JourneyError(f"{text}: a margin that rises from 0, and {min_accuracy:.0%} were promised")
    return text


# The command


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when every promise was kept, 2 when one was not, or a command failed."""
    corpus = "bytes of text to write (default: 4,000,000)"
    parser = build_parser("chat", __doc__, EPILOG, MIN_LOSS_DROP, corpus)
    share = "share of {} that must be right, else this fails (default: %(default)s)"
    for name, what, floor in (
        ("right", "questions", MIN_RIGHT),
        ("accuracy", "held-out pairs", MIN_ACCURACY),
    ):
        parser.add_argument(
            f"--min-{name}", type=float, default=floor, metavar="SHARE", help=share.format(what)
        )
    return travel("chat", parser.parse_args(argv), teach_and_talk)


if __name__ == "__main__":
    exit_with(main)
