"""For tests: an OpenAI-compatible endpoint on the loopback address, over a model in this process, that can be made to
behave as badly as the real ones do.

    with LoopbackEndpoint(RandomModel(), quirks=Quirks(echo="off_by_one")) as endpoint:
        lm = OpenAICompatibleLM("local", base_url=endpoint.base_url)
"""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .backends.local import LocalModel
from .flows import Failed
from .requests import Advance, OpenRows
from .texts import Message
from .tokens import TokenIds, Tokenizer, with_bos

Json = dict[str, Any]
MOST_ALTERNATIVES = 20


@dataclass(frozen=True, slots=True)
class Quirks:
    """How the endpoint behaves; the defaults are those of a good server."""

    completions: bool = True
    chat: bool = True
    models: tuple[str, ...] | None = ("local",)
    """The model list; None: there is none. Every name is served."""
    logprobs: Literal["given", "absent", "refused"] = "given"
    """`absent`: status 200 and no log-probs; `refused`: status 400."""
    most_alternatives: int = MOST_ALTERNATIVES
    too_many: Literal["refused", "fewer"] = "refused"
    """What happens when more alternatives are asked for."""
    echo: Literal["given", "ignored", "off_by_one", "refused"] = "given"
    prompt_logprobs: bool = True
    logit_bias: Literal["raw", "biased", "ignored"] = "raw"
    """Whether log-probs under a bias contain it."""
    token_ids: bool = True
    names_ids: bool = True
    """`return_tokens_as_token_ids` is understood; where it is not, it is ignored."""
    batched_prompts: bool = True
    chat_continuation: Literal["continue_final_message", "assistant_message", "prefix", "new_turn"] = (
        "continue_final_message"
    )
    sampled_first: bool = False
    """Chat alternatives begin with the token that was written, wherever it ranks."""
    drops_partial_characters: bool = False
    """A token that is a part of a character has no entry in the log-probs."""
    colliding_texts: bool = False
    """Different tokens have the same text (letters lose their case), so a dict by text loses some."""
    impossible: bool = False
    """The least of the alternatives is given as -9999."""
    end_entry: bool = True
    """The end token has an entry in the log-probs."""
    usage: bool = True


@dataclass(frozen=True, slots=True)
class Failure:
    """What goes wrong with one request: an HTTP status, or one of the ways in which connections die."""

    kind: Literal["status", "hang", "body_cut", "not_json", "stream_cut"] = "status"
    status: int = 500
    retry_after: str | None = None
    message: str = "something went wrong"
    after: int = 3
    """Events of a stream that arrive before it is cut."""


class LoopbackEndpoint:
    """A server in threads of this process. `requests` are the bodies it was sent, in order; `paths` their paths."""

    def __init__(self, lm: LocalModel, *, quirks: Quirks | None = None, delay: float = 0.0) -> None:
        self.lm = lm
        self.quirks = quirks or Quirks()
        self.delay = delay
        """Seconds before each token of a stream and before each whole answer."""
        self.requests: list[Json] = []
        self.paths: list[str] = []
        self.headers: list[Mapping[str, str]] = []
        self.running = 0
        self.most_running = 0
        self.abandoned = 0
        """Requests whose asker went away before the answer was whole."""
        self._lock = threading.Lock()
        self._failures: deque[Failure] = deque()
        self._fails: Callable[[Json], Failure | None] = lambda body: None
        handler = type("Handler", (_Handler,), {"endpoint": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> LoopbackEndpoint:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._server.end_connections()
        self._thread.join()

    def fail(self, *failures: Failure) -> None:
        """The next requests that write fail so, one each."""
        self._failures.extend(failures)

    def fail_if(self, fails: Callable[[Json], Failure | None]) -> None:
        """Requests fail as this function of their body says."""
        self._fails = fails

    def wait_idle(self, seconds: float = 5.0) -> bool:
        """Whether no request is running any more, after at most so long."""
        until = time.monotonic() + seconds
        while self.running and time.monotonic() < until:
            time.sleep(0.005)
        return self.running == 0

    def begun(self, path: str, body: Json, headers: Mapping[str, str]) -> Failure | None:
        with self._lock:
            self.requests.append(body)
            self.paths.append(path)
            self.headers.append(headers)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            return self._fails(body) or (self._failures.popleft() if self._failures else None)

    def ended(self, *, abandoned: bool) -> None:
        with self._lock:
            self.running -= 1
            self.abandoned += abandoned


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 512

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(address, handler)
        self._open: set[socket.socket] = set()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._open.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """An asker that goes away is what tests do."""

    def end_connections(self) -> None:
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


class _Refused(Exception):
    """The request is answered with 400 or 404."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class _Gone(Exception):
    """The asker has closed the connection."""


class _Handler(BaseHTTPRequestHandler):
    endpoint: LoopbackEndpoint
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        models = self.endpoint.quirks.models
        if self.path != "/v1/models" or models is None:
            self._send(404, {"error": {"message": f"no route {self.path}"}})
        else:
            self._send(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in models]})

    def do_POST(self) -> None:
        body: Json = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or b"{}")
        failure = self.endpoint.begun(self.path, body, dict(self.headers.items()))
        gone = False
        try:
            self._respond(body, failure)
        except (_Gone, ConnectionError):
            gone, self.close_connection = True, True
        finally:
            self.endpoint.ended(abandoned=gone)

    def _respond(self, body: Json, failure: Failure | None) -> None:
        if failure is not None and failure.kind == "hang":
            self._pause(3600.0)
        if failure is not None and failure.kind == "status":
            waits = {} if failure.retry_after is None else {"retry-after": failure.retry_after}
            self._send(failure.status, {"error": {"message": failure.message}}, waits)
            return
        try:
            writer = _Writer(self.endpoint, self.path, body)
            if body.get("stream"):
                self._stream(writer, failure)
                return
            self._pause(self.endpoint.delay)
            self._send_cut(writer.whole(), failure)
        except _Refused as refused:
            self._send(refused.status, {"error": {"message": str(refused), "type": "invalid_request_error"}})

    def _send(self, status: int, data: Json, headers: Mapping[str, str] | None = None) -> None:
        content = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _send_cut(self, data: Json, failure: Failure | None) -> None:
        """The answer, whole or as the failure leaves it."""
        if failure is None:
            self._send(200, data)
            return
        content = json.dumps(data).encode()
        whole = failure.kind == "not_json"
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content) // 2 if whole else len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.close_connection = True

    def _stream(self, writer: _Writer, failure: Failure | None) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for count, event in enumerate(writer.events()):
            if failure is not None and failure.kind == "stream_cut" and count == failure.after:
                self.close_connection = True
                return
            self._pause(self.endpoint.delay)
            self._chunk(f"data: {json.dumps(event)}\n\n".encode())
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _chunk(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")

    def _pause(self, seconds: float) -> None:
        """Wait, and notice when nobody waits for the answer any more."""
        until = time.monotonic() + seconds
        while True:
            readable, _, _ = select.select([self.connection], [], [], max(0.0, min(0.02, until - time.monotonic())))
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                raise _Gone
            if time.monotonic() >= until:
                return
            if readable:
                time.sleep(0.005)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One token with what its log-probs are: given ones (perhaps biased) and a row of all."""

    token: int
    logprob: float | None
    row: NDArray[np.float32] | None


class _Writer:
    """One request, written out."""

    def __init__(self, endpoint: LoopbackEndpoint, path: str, body: Json) -> None:
        self.lm, self.quirks, self.body = endpoint.lm, endpoint.quirks, body
        self.tokenizer: Tokenizer = endpoint.lm.tokenizer  # type: ignore[assignment]
        self.chat = path.endswith("/chat/completions")
        if path not in ("/v1/completions", "/v1/chat/completions"):
            raise _Refused(f"no route {path}", 404)
        if not (self.quirks.chat if self.chat else self.quirks.completions):
            raise _Refused(f"no route {path}", 404)
        self.prompts = [self._chat_prompt()] if self.chat else self._completion_prompts()
        self.wants = bool(body.get("logprobs")) or body.get("logprobs") == 0
        self.alternatives = self._alternatives()
        self.rng = np.random.default_rng(body.get("seed"))

    # --- what is asked ---

    def _completion_prompts(self) -> list[TokenIds]:
        prompt: Any = self.body.get("prompt")
        several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
        if several and not self.quirks.batched_prompts:
            raise _Refused("one prompt a request")
        prompts: list[TokenIds] = []
        for one in prompt if several else [prompt]:
            if isinstance(one, str):
                prompts.append(with_bos(self.tokenizer, self.tokenizer.encode(one)))
            elif not self.quirks.token_ids:
                raise _Refused("prompt must be a string")
            else:
                prompts.append(tuple(one))
            if self.lm.context_window is not None and len(prompts[-1]) >= self.lm.context_window:
                raise _Refused(f"the prompt has {len(prompts[-1])} tokens, the window is {self.lm.context_window}")
        return prompts

    def _chat_prompt(self) -> TokenIds:
        sent: list[Json] = self.body["messages"]
        way = self.quirks.chat_continuation
        begun = sent[-1]["role"] == "assistant" and (
            way == "assistant_message"
            or (way == "continue_final_message" and self.body.get("continue_final_message"))
            or (way == "prefix" and sent[-1].get("prefix"))
        )
        if self.body.get("continue_final_message") and way != "continue_final_message":
            raise _Refused("unknown field continue_final_message")
        messages = [Message(one["role"], one["content"]) for one in (sent[:-1] if begun else sent)]
        ids = self.tokenizer.encode_chat(messages)
        if ids is None:
            raise _Refused("the model has no chat template")
        return (*ids, *self.tokenizer.encode(sent[-1]["content"] if begun else ""))

    def _alternatives(self) -> int:
        asked = self.body.get("top_logprobs", 0) if self.chat else int(self.body.get("logprobs") or 0)
        if self.wants and self.quirks.logprobs == "refused":
            raise _Refused("this model does not support logprobs")
        if asked > self.quirks.most_alternatives and self.quirks.too_many == "refused":
            raise _Refused(f"at most {self.quirks.most_alternatives} logprobs can be asked for, not {asked}")
        return min(asked, self.quirks.most_alternatives)

    # --- what is written ---

    def _written(self, prompt: TokenIds) -> Iterator[_Entry]:
        """The tokens of an answer, the end token included."""
        if self.body.get("max_tokens", self.body.get("max_completion_tokens", 16)) == 0:
            return
        rows: Any = self._ask(OpenRows((prompt,)))
        logprobs = rows.logprobs[0]
        for _ in range(int(self.body.get("max_tokens", self.body.get("max_completion_tokens", 16)))):
            token, row = self._chosen(logprobs)
            yield _Entry(token, float(row[token]), row)
            if token in self.tokenizer.end_ids:
                return
            logprobs = self._ask(Advance(rows, token))[0]

    def _ask(self, request: Any) -> Any:
        [reply] = self.lm.below.answer([request])
        if isinstance(reply, Failed):
            raise _Refused(str(reply.error))
        return reply

    def _chosen(self, raw: NDArray[np.float32]) -> tuple[int, NDArray[np.float32]]:
        biased = raw.copy()
        if self.quirks.logit_bias != "ignored":
            for token, bias in (self.body.get("logit_bias") or {}).items():
                biased[int(token)] += bias
        temperature = float(self.body.get("temperature", 1.0))
        chosen = int(biased.argmax())
        if temperature > 0:
            weights = np.exp((biased - biased.max()).astype(np.float64) / temperature)
            chosen = int(self.rng.choice(len(weights), p=weights / weights.sum()))
        if self.quirks.logit_bias == "biased":
            raw = biased - np.float32(np.logaddexp.reduce(biased.astype(np.float64)))
        return chosen, raw

    def _echoed(self, prompt: TokenIds) -> list[_Entry]:
        entries: list[_Entry] = []
        for index, token in enumerate(prompt):
            row = self._ask(OpenRows((prompt[:index],))).logprobs[0] if index else None
            entries.append(_Entry(token, None if row is None else float(row[token]), row))
        return entries

    def _shifted(self, entries: list[_Entry]) -> list[_Entry]:
        """The quirk "off_by_one": each token with the value of the next."""
        if self.quirks.echo != "off_by_one":
            return entries
        values = [entry.logprob for entry in entries[1:]] + [-1.0]
        return [_Entry(entry.token, value, entry.row) for entry, value in zip(entries, values, strict=True)]

    # --- how it is said ---

    def whole(self) -> Json:
        choices, written, prompted = [], 0, 0
        for index, prompt in enumerate(self.prompts):
            entries = list(self._written(prompt))
            text, finish, kept = self._cut(entries)
            echoed: list[_Entry] = []
            if self.body.get("echo") and not self.chat and self.quirks.echo != "ignored":
                if self.quirks.echo == "refused":
                    raise _Refused("echo is not supported")
                echoed = self._shifted(self._echoed(prompt))
                text = self.tokenizer.decode(prompt) + text
            said: Json = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            choice = {"index": index, **said, "finish_reason": finish, "logprobs": self._logprobs([*echoed, *kept])}
            if "prompt_logprobs" in self.body and self.quirks.prompt_logprobs:
                choice["prompt_logprobs"] = self._prompt_logprobs(prompt)
            choices.append(choice)
            written, prompted = written + len(entries), prompted + len(prompt)
        # the order of choices is not promised
        return {
            "object": "x",
            "model": self.body.get("model"),
            "choices": choices[::-1],
            **self._usage(prompted, written),
        }

    def events(self) -> Iterator[Json]:
        [prompt] = self.prompts
        entries: list[_Entry] = []
        given = ""
        for entry in self._written(prompt):
            entries.append(entry)
            text, finish, _ = self._cut(entries)
            piece = "" if text.endswith("\ufffd") else text[len(given) :]
            given += piece
            yield self._event(piece, None if finish == "length" else finish, [entry])
            if finish != "length":
                break
        else:
            yield self._event(self._cut(entries)[0][len(given) :], "length", [])
        if (self.body.get("stream_options") or {}).get("include_usage") and self.quirks.usage:
            yield {"choices": [], **self._usage(len(prompt), len(entries))}

    def _event(self, piece: str, finish: str | None, entries: list[_Entry]) -> Json:
        if not self.quirks.end_entry:
            entries = [entry for entry in entries if entry.token not in self.tokenizer.end_ids]
        said: Json = {"delta": {"content": piece}} if self.chat else {"text": piece}
        return {"choices": [{"index": 0, **said, "finish_reason": finish, "logprobs": self._logprobs(entries)}]}

    def _cut(self, entries: list[_Entry]) -> tuple[str, str, list[_Entry]]:
        """Text, finish reason and entries, up to the end token or the first stop string."""
        ended = bool(entries) and entries[-1].token in self.tokenizer.end_ids
        kept = entries if self.quirks.end_entry or not ended else entries[:-1]
        text = self.tokenizer.decode([entry.token for entry in entries])
        stops: Any = self.body.get("stop") or []
        found = [at for stop in ([stops] if isinstance(stops, str) else stops) if (at := text.find(stop)) >= 0]
        if found:
            return text[: min(found)], "stop", kept
        return text, "stop" if ended else "length", kept

    def _usage(self, prompted: int, written: int) -> Json:
        if not self.quirks.usage:
            return {}
        usage = {"prompt_tokens": prompted, "completion_tokens": written, "total_tokens": prompted + written}
        return {"usage": usage}

    def _text(self, token: int) -> str:
        if self.quirks.names_ids and self.body.get("return_tokens_as_token_ids"):
            return f"token_id:{token}"
        text = self.tokenizer.decode([token])
        return text.lower() if self.quirks.colliding_texts else text

    def _listed(self, entry: _Entry) -> list[tuple[str, float]]:
        if entry.row is None or not self.alternatives:
            return []
        best = [int(token) for token in np.argsort(-entry.row, kind="stable")[: self.alternatives]]
        if self.quirks.sampled_first:
            best = [entry.token, *[token for token in best if token != entry.token]][: self.alternatives]
        values = [float(max(entry.row[token], -9999.0)) for token in best]
        if self.quirks.impossible:
            values[-1] = -9999.0
        return [(self._text(token), value) for token, value in zip(best, values, strict=True)]

    def _logprobs(self, entries: list[_Entry]) -> Json | None:
        if not self.wants or self.quirks.logprobs != "given":
            return None
        if self.quirks.drops_partial_characters:
            entries = [entry for entry in entries if "\ufffd" not in self.tokenizer.decode([entry.token])]
        if self.chat:
            return {
                "content": [
                    {
                        "token": self._text(entry.token),
                        "logprob": entry.logprob,
                        "top_logprobs": [{"token": text, "logprob": value} for text, value in self._listed(entry)],
                    }
                    for entry in entries
                ]
            }
        texts = [self._text(entry.token) for entry in entries]
        return {
            "tokens": texts,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [dict(self._listed(entry)) if entry.row is not None else None for entry in entries],
            "text_offset": [sum(map(len, texts[:index])) for index in range(len(texts))],
        }

    def _prompt_logprobs(self, prompt: TokenIds) -> Sequence[Json | None]:
        return [
            None
            if entry.logprob is None
            else {str(entry.token): {"logprob": entry.logprob, "decoded_token": self.tokenizer.decode([entry.token])}}
            for entry in self._echoed(prompt)
        ]
