"""Where prompts come from: the stream that a replay buffer draws from, and what evaluations ask.

stream.py      what a stream is; a built-in task's        encoding.py    texts and chats to token ids
mixture.py     a stream of several sources of rows        reading.py     a row to a prompt, or to why it makes none
passes.py      rows in passes, mapped or streamed         live.py        rows of a source that grows; live_readers.py finds them
dataset.py     opens what the config names                checks.py      looks at it before any work starts
cursor.py      how far all of this was drawn
"""

from async_rlhf.prompts.checks import absolute_sources, check_prompts
from async_rlhf.prompts.cursor import PromptCursor, SourceCursor
from async_rlhf.prompts.dataset import held_out_prompts, make_stream
from async_rlhf.prompts.encoding import Encode, encode_problem, load_encode
from async_rlhf.prompts.stream import PromptSource, PromptStream, TaskStream

__all__ = [
    "Encode",
    "PromptCursor",
    "PromptSource",
    "PromptStream",
    "SourceCursor",
    "TaskStream",
    "absolute_sources",
    "check_prompts",
    "encode_problem",
    "held_out_prompts",
    "load_encode",
    "make_stream",
]
