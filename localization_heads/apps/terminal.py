"""The conversation of `cli_mode=true`: streamed answers, and a few commands that begin with a slash."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from localization_heads.apps.tables import box_text, grounding_text
from localization_heads.data.images import load_image
from localization_heads.errors import UsageError, WorkError, printable
from localization_heads.heads.head import Head, check_heads
from localization_heads.locating import ground
from localization_heads.lvlm.conversation import Conversation
from localization_heads.options.compose import describe_preset
from localization_heads.options.groups import ConvMode
from localization_heads.options.stage_groups import MAX_TRACE_TOKENS
from localization_heads.stages.run import ChatRun
from localization_heads.stages.single import default_id
from localization_heads.stages.trace import write_trace
from localization_heads.store.paths import entry_path, expand_home

if TYPE_CHECKING:
    from PIL import Image
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.history import History

COMMANDS = ("/image", "/ground", "/trace", "/help", "/exit")
HELP = """\
Type a question and press Enter. Ctrl-C stops an answer.
/image PATH         look at another image (a path or an http address)
/ground EXPRESSION  where is it? prints the box and saves the overlay
/trace QUESTION     the answer, and a page with what the heads looked at for each of its words
/help               this list
/exit               leave (so does Ctrl-D)"""


def converse(run: ChatRun) -> int:
    """Answer questions and commands until `/exit` or the end of the input."""
    session, read_line = Session(run, start(run)), make_line_reader()
    print_line(f"{run.lvlm.name}: /help lists the commands")
    while True:
        try:
            line = read_line().strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print_line("/exit leaves")
            continue
        if line == "/exit":
            return 0
        if line:
            session.handle(line)


def start(run: ChatRun) -> Conversation:
    """Start a conversation, about `image_file` if it is given."""
    run.lvlm.recent.max_bytes = run.options.picture_memory * 2**20
    image = load_image(run.resolve_image(run.options.image_file)) if run.options.image_file else None
    return Conversation(run.lvlm, image, run.options.max_new_tokens)


def print_answer(conversation: Conversation, question: str) -> None:
    """Print the answer while it is generated. Ctrl-C stops the answer, not the program."""
    pieces = conversation.ask(question)
    try:
        for piece in pieces:
            sys.stdout.write(printable(piece))
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stdout.write(" [stopped]")
    finally:
        pieces.close()
    sys.stdout.write("\n")


@dataclass
class Session:
    """A conversation, and the commands on its image."""

    run: ChatRun
    conversation: Conversation

    def __post_init__(self) -> None:
        self.image_name = str(self.run.resolve_image(self.run.options.image_file or ""))
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": self.change_image,
            "/ground": self.ground,
            "/trace": self.trace,
            "/help": lambda _: print_line(HELP),
        }

    def handle(self, line: str) -> None:
        """Answer a question or run a command. Errors are printed, and the conversation continues."""
        word, _, rest = line.partition(" ")
        try:
            if not line.startswith("/"):
                print_answer(self.conversation, line)
            elif word in self.commands:
                self.commands[word](rest.strip())
            else:
                print_line(f"{word} is no command; /help lists them")
        except (UsageError, WorkError) as error:
            print_line(f"error: {error}")
        except KeyboardInterrupt:
            print_line("stopped")
        except Exception as error:  # no failure may end the conversation
            print_line(f"error: {type(error).__name__}: {' '.join(str(error).split())}")

    def change_image(self, path: str) -> None:
        """Load another image and start a new conversation about it."""
        if not path:
            raise UsageError("write /image PATH")
        source = self.run.resolve_image(expand_home(path))
        image = load_image(source)
        self.conversation.look_at(image)
        self.image_name = str(source)
        print_line(f"looking at {source}, {image.width} x {image.height} pixels")

    def ground(self, expression: str) -> None:
        """Print the box and save the figure."""
        from localization_heads import figures

        image = self._require_image(expression, "/ground EXPRESSION, such as /ground the dog")
        lvlm = self.run.lvlm.prompted(self._conv_mode())
        options, heads = self.run.options, self._heads()
        grounding = ground(
            lvlm,
            image,
            expression,
            heads,
            options=options.grounding,
            segmenter=self.run.segmenter,
            calibration=self.run.calibration_for(heads, lvlm),
            abstain=options.abstain,
        )
        path = self._path(expression, "_grounding.png")
        figures.plot_grounding(image, grounding, path, expression=expression)
        print_line(f"box {grounding_text(grounding, describe_preset('grounding', options.grounding))}")
        print_line(f"wrote {path}")

    def trace(self, question: str) -> None:
        """Print the answer with the box of each word, and save page and figure. It is not part of the conversation."""
        image = self._require_image(question, "/trace QUESTION, such as /trace what is in this image?")
        options = self.run.options
        trace = self.run.lvlm.trace(
            image,
            question,
            self._heads(),
            max_new_tokens=min(options.max_new_tokens, MAX_TRACE_TOKENS),
            options=options.grounding,
        )
        page = self._path(question, "_trace.html")
        paths = write_trace(replace(trace, image_file=self.image_name), image, page)
        print_line(trace.answer or "(nothing)")
        for word, box in zip(trace.words, trace.boxes, strict=True):
            print_line(f"  {word.text}: {'nothing stands out' if box is None else box_text(box)}")
        for path in paths:
            print_line(f"wrote {path}")

    def _require_image(self, text: str, usage: str) -> Image.Image:
        """The image of the conversation. UsageError if there is none, or if the command has no text."""
        if self.conversation.image is None:
            raise UsageError("there is no image yet: /image PATH")
        if not text:
            raise UsageError(f"write {usage}")
        return self.conversation.image

    def _conv_mode(self) -> ConvMode:
        """The prompt that the heads were found with, or the paper's if it is not known."""
        found_with = (self.run.heads_found_with or {}).get("conv_mode")
        modes: tuple[ConvMode, ...] = get_args(ConvMode)
        return next((mode for mode in modes if mode == found_with), "referseg")

    def _heads(self) -> tuple[Head, ...] | None:
        heads = self.run.named_heads
        check_heads(heads or (), self.run.lvlm.num_layers, self.run.lvlm.num_heads)
        return heads

    def _path(self, text: str, ending: str) -> Path:
        """The path of an output file for the image and a text."""
        id = default_id(self.image_name or "picture", text)
        return entry_path(self.run.attention_folder, id, ending)


def make_line_reader() -> Callable[[], str]:
    """A function that reads a line, with history and completion on a terminal. It raises EOFError at the end."""
    if sys.stdin.isatty():
        return _make_prompt()

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # undecodable bytes fail their own line only

    def read() -> str:
        if not (line := sys.stdin.readline()):
            raise EOFError
        return line

    return read


def _make_prompt() -> Callable[[], str]:
    """A prompt with editing, completion by Tab, and a history that persists between conversations."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.auto_suggest import AutoSuggestFromHistory

    session: PromptSession[str] = PromptSession(
        history=_history(), auto_suggest=AutoSuggestFromHistory(), completer=completer()
    )
    return lambda: session.prompt("> ")


def _history() -> History:
    """The history in the user's state folder, or in memory if that folder is not writable."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(state) / "localization-heads" / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()

    class HistoryWithoutAddresses(FileHistory):
        """Lines with an address are not stored, since it may contain a password."""

        def store_string(self, string: str) -> None:
            if "://" not in string:
                super().store_string(string)

    return HistoryWithoutAddresses(str(path))


def completer() -> Completer:
    """Completes the commands and, after `/image`, file names."""
    from prompt_toolkit.completion import PathCompleter, WordCompleter, merge_completers
    from prompt_toolkit.document import Document

    class ImageCompleter(PathCompleter):
        """Completes the path after `/image`."""

        def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
            command, space, path = document.text_before_cursor.partition(" ")
            return super().get_completions(Document(path), event) if command == "/image" and space else ()

    return merge_completers([WordCompleter(list(COMMANDS), sentence=True), ImageCompleter(expanduser=True)])


def print_line(text: str) -> None:
    sys.stdout.write(printable(text) + "\n")
    sys.stdout.flush()
