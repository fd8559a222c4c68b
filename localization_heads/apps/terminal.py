"""The conversation of `cli_mode=true`: streaming answers and a few commands that begin with a slash."""

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
from localization_heads.head_choice import check_heads
from localization_heads.heads.head import Head
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
    """Read lines until `/exit` or the end of the input."""
    session, read = Session(run, start(run)), line_reader()
    say(f"{run.lvlm.name}: /help lists the commands")
    while True:
        try:
            line = read().strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            say("/exit leaves")
            continue
        if line == "/exit":
            return 0
        if line:
            session.handle(line)


def start(run: ChatRun) -> Conversation:
    """A conversation about `image_file`, if one is named."""
    run.lvlm.recent.max_bytes = run.options.picture_memory * 2**20
    image = load_image(run.resolve_image(run.options.image_file)) if run.options.image_file else None
    return Conversation(run.lvlm, image, run.options.max_new_tokens)


def print_answer(conversation: Conversation, question: str) -> None:
    """Print the answer as it comes. Ctrl-C stops it, and the program goes on."""
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
    """A conversation and the image it is about."""

    run: ChatRun
    conversation: Conversation

    def __post_init__(self) -> None:
        self.image_name = str(self.run.resolve_image(self.run.options.image_file or ""))
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": self.look_at,
            "/ground": self.ground,
            "/trace": self.trace,
            "/help": lambda _: say(HELP),
        }

    def handle(self, line: str) -> None:
        """Carry out one line; what goes wrong is said, and the conversation goes on."""
        word, _, rest = line.partition(" ")
        try:
            if not line.startswith("/"):
                print_answer(self.conversation, line)
            elif word in self.commands:
                self.commands[word](rest.strip())
            else:
                say(f"{word} is no command; /help lists them")
        except (UsageError, WorkError) as error:
            say(f"error: {error}")
        except KeyboardInterrupt:
            say("stopped")
        except Exception as error:  # no single failure may end the conversation
            say(f"error: {type(error).__name__}: {' '.join(str(error).split())}")

    def look_at(self, path: str) -> None:
        if not path:
            raise UsageError("write /image PATH")
        source = self.run.resolve_image(expand_home(path))
        image = load_image(source)
        self.conversation.look_at(image)
        self.image_name = str(source)
        say(f"looking at {source}, {image.width} x {image.height} pixels")

    def ground(self, expression: str) -> None:
        """Print the box and save the overlay."""
        from localization_heads import figures

        image = self._image(expression, "/ground EXPRESSION, such as /ground the dog")
        lvlm = self.run.lvlm.prompted(self._conv_mode())
        options, segmenter, heads = self.run.options.grounding, self.run.segmenter, self._heads()
        found = ground(
            lvlm,
            image,
            expression,
            heads,
            options=options,
            segmenter=segmenter,
            calibration=self.run.calibration_for(heads, lvlm),
            abstain=self.run.options.abstain,
        )
        path = self._path(expression, "_grounding.png")
        figures.plot_grounding(image, found, path, expression=expression)
        say(f"box {grounding_text(found, describe_preset('grounding', self.run.options.grounding))}")
        say(f"wrote {path}")

    def trace(self, question: str) -> None:
        """Print the answer with the box of each word, and save page and figure. The conversation does not go on."""
        image = self._image(question, "/trace QUESTION, such as /trace what is in this image?")
        options = self.run.options
        found = self.run.lvlm.trace(
            image,
            question,
            self._heads(),
            max_new_tokens=min(options.max_new_tokens, MAX_TRACE_TOKENS),
            options=options.grounding,
        )
        page = self._path(question, "_trace.html")
        paths = write_trace(replace(found, image_file=self.image_name), image, page)
        say(found.answer or "(nothing)")
        for word, box in zip(found.words, found.boxes, strict=True):
            say(f"  {word.text}: {'nothing stands out' if box is None else box_text(box)}")
        for path in paths:
            say(f"wrote {path}")

    def _image(self, asked: str, how: str) -> Image.Image:
        """The image that something is asked about. UsageError without one, or where nothing is asked."""
        if self.conversation.image is None:
            raise UsageError("there is no image yet: /image PATH")
        if not asked:
            raise UsageError(f"write {how}")
        return self.conversation.image

    def _conv_mode(self) -> ConvMode:
        """The prompt that the heads were found with; the paper's where that is not known."""
        found = (self.run.heads_found_with or {}).get("conv_mode")
        modes: tuple[ConvMode, ...] = get_args(ConvMode)
        return next((mode for mode in modes if mode == found), "referseg")

    def _heads(self) -> tuple[Head, ...] | None:
        heads = self.run.named_heads
        check_heads(heads or (), self.run.lvlm.num_layers, self.run.lvlm.num_heads)
        return heads

    def _path(self, text: str, ending: str) -> Path:
        """Of a file about the image and what was asked."""
        id = default_id(self.image_name or "picture", text)
        return entry_path(self.run.attention_folder, id, ending)


def line_reader() -> Callable[[], str]:
    """How lines come in: with history and completion on a terminal, plainly from a pipe. EOFError at the end."""
    if sys.stdin.isatty():
        return _prompt()

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes in another encoding cost their line only

    def read() -> str:
        if not (line := sys.stdin.readline()):
            raise EOFError
        return line

    return read


def _prompt() -> Callable[[], str]:
    """A line with editing; up and ctrl-R find earlier lines, also of earlier conversations, Tab completes."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.auto_suggest import AutoSuggestFromHistory

    session: PromptSession[str] = PromptSession(
        history=_history(), auto_suggest=AutoSuggestFromHistory(), completer=completer()
    )
    return lambda: session.prompt("> ")


def _history() -> History:
    """Earlier lines, kept beside other programs' state; in memory where that place cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(state) / "localization-heads" / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()

    class Lines(FileHistory):
        """Without the addresses, which may hold passwords."""

        def store_string(self, string: str) -> None:
            if "://" not in string:
                super().store_string(string)

    return Lines(str(path))


def completer() -> Completer:
    """Tab completes the commands, and after `/image` the names of files."""
    from prompt_toolkit.completion import PathCompleter, WordCompleter, merge_completers
    from prompt_toolkit.document import Document

    class Files(PathCompleter):
        """Completes what follows `/image`."""

        def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
            command, space, path = document.text_before_cursor.partition(" ")
            return super().get_completions(Document(path), event) if command == "/image" and space else ()

    return merge_completers([WordCompleter(list(COMMANDS), sentence=True), Files(expanduser=True)])


def say(text: str) -> None:
    sys.stdout.write(printable(text) + "\n")
    sys.stdout.flush()
