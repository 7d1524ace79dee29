"""The aiohttp application: its routes and their handlers.

What every request passes through before is in `minserve.server.edge`.

The module uses only the public interface of the engine: ``submit``, the handles that it
returns, ``stats``, and the tokenizer.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

from aiohttp import web

from minserve.errors import EngineStoppedError, InvalidRequestError
from minserve.server.chat_facts import find_chat_facts
from minserve.server.connections import ConnectionRunner
from minserve.server.edge import Edge
from minserve.server.engine_face import EngineFace, ReplicaSet
from minserve.server.errors import HttpError, unavailable
from minserve.server.generation import streamed_response, whole_response
from minserve.server.json_array import dump_json
from minserve.server.keys import KEY_NUMBER
from minserve.server.limits import time_limit
from minserve.server.metrics import CONTENT_TYPE, count_tasks, create_registry, render
from minserve.server.openapi import openapi_json
from minserve.server.page.feed import Feeds
from minserve.server.page.front_page import example_command, front_page, page_file
from minserve.server.reading.body_reader import BodyReader
from minserve.server.reading.reader import Endpoint, Facts, check_model
from minserve.server.reply import Reply
from minserve.server.request_record import RECORD, GenerationRecord
from minserve.server.responses_api.response_reply import ResponseReply
from minserve.server.responses_api.responses_call import ResponsesCall, name_own_field
from minserve.server.watchdog import problem_of
from minserve.server_config import ServerConfig

# The time in which connections may send their last bytes once the engine has stopped.
FLUSH_TIMEOUT_S = 5.0
LOOPBACK = ("127.0.0.1", "::1")
# Where a request keeps the names of its hints that change nothing.
IGNORED = web.RequestKey("ignored", tuple[str, ...])


class Server:
    """The handlers of all routes, and the little state that they share.

    Args:
        config: the server's settings.
        engine: a started engine; ``None`` while it is still loading, and set later.

    Raises:
        ConfigError: if the file of API keys cannot be used, or traces are wanted and cannot be made.
    """

    def __init__(self, config: ServerConfig, engine: EngineFace | None = None) -> None:
        self.config = config
        self.engine = engine
        self.draining = False
        self._edge = Edge(config)
        self._bodies: BodyReader | None = None
        self._feeds = Feeds(self._loaded_engine, lambda: self._model_name)
        self._created = int(time.time())
        self._metrics = create_registry(
            self._loaded_engine, lambda: self._model_name, config.metrics_prefix
        )
        self._count_tasks = count_tasks(self._metrics, config.metrics_prefix)

    def create_app(self) -> web.Application:
        """Return the application with all routes."""
        app = web.Application(
            middlewares=self._edge.middlewares,
        )
        app.on_response_prepare.extend([*self._edge.signals, _name_ignored])
        app.on_shutdown.append(self._feeds.close)
        app.on_cleanup.extend([self._close, self._edge.close])
        app.add_routes(
            [
                web.get("/", self.front_page),
                # To HEAD it would be a stream without end that sends nothing.
                web.get("/page/feed", self._feeds.answer, allow_head=False),
                # Not the feed: HEAD of it has no answer.
                web.get("/page/{file:(?!feed$)[^{}/]+}", self.page_file),
                web.get("/openapi.json", self.openapi),
                web.get("/health", self.health),
                web.get("/metrics", self.metrics),
                web.get("/v1/models", self.list_models),
                web.get("/v1/models/{model:.+}", self.get_model),
                web.post("/v1/completions", self.completions),
                web.post("/v1/chat/completions", self.chat_completions),
                web.post("/v1/responses", self.responses),
                web.get("/v1/responses/{response}", self.stored_response),
                web.delete("/v1/responses/{response}", self.stored_response),
                web.get("/v1/responses/{response}/input_items", self.stored_response),
                web.post("/v1/responses/{response}/cancel", self.stored_response),
                web.post("/tokenize", self.tokenize),
                web.post("/detokenize", self.detokenize),
                web.get("/replicas", self.replicas),
                web.post("/replicas/{number:[0-9]{1,6}}/{verb:drain|resume|restart}", self.control),
            ]
        )
        return app

    def create_runner(self) -> ConnectionRunner:
        """Return a runner with the connections that the handlers rely on."""
        return ConnectionRunner(self.create_app(), self.config, FLUSH_TIMEOUT_S)

    # --- endpoints ---

    async def front_page(self, request: web.Request) -> web.Response:
        """Answer with a page for people: the model and a command to try; 503 while it loads."""
        # Not `request.host`: where a request names none, that asks a name service, and waits.
        host = request.headers.get("Host", self.config.host)
        url, needs_key = f"{request.scheme}://{host}", self.config.has_keys
        if self.engine is None:
            return front_page(url, "The model is still loading.", None, status=503)
        model = None if needs_key else self._model_name
        chat = self.engine.tokenizer.has_chat_template
        return front_page(
            url,
            "Requests need this server's API key." if model is None else f"It serves {model}.",
            example_command(url, model, chat=chat, needs_key=needs_key),
        )

    async def page_file(self, request: web.Request) -> web.Response:
        """Answer with a file that the page loads; 404 for an unknown one."""
        return page_file(request.match_info["file"])

    async def health(self, request: web.Request) -> web.Response:
        """Answer 200 while the server takes requests, and 503 otherwise.

        The body holds the number of outputs that clients wait for and, with several replicas, the
        number of replicas in each state.
        """
        engine = self._ready_engine()
        if problem := problem_of(engine, self.config.watchdog_s):
            raise unavailable(problem)
        body: dict[str, Any] = {"status": "ok", "unfinished": engine.num_unfinished}
        if engine.replica_set is not None:
            body["replicas"] = Counter(one["state"] for one in engine.replica_set.replicas())
        return _json(body)

    async def metrics(self, request: web.Request) -> web.Response:
        """Answer with the Prometheus metrics of the newest iteration.

        Like /health, it needs no API key. It answers while the server drains too, and with 503
        while the model loads.
        """
        self._count_tasks()
        # In a thread: formatting takes a few milliseconds, and no stream should wait for it.
        text = await asyncio.to_thread(render, self._metrics)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})

    async def openapi(self, request: web.Request) -> web.Response:
        """Answer with the description of all endpoints, in OpenAPI 3.1."""
        return web.Response(body=openapi_json(), content_type="application/json")

    async def list_models(self, request: web.Request) -> web.Response:
        """Answer with a list that holds the one model."""
        return _json({"object": "list", "data": [self._model_card()]})

    async def get_model(self, request: web.Request) -> web.Response:
        """Answer with the one model, asked for by its name."""
        check_model(request.match_info["model"], self._model_name)
        return _json(self._model_card())

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Answer POST /v1/completions."""
        return await self._generate(request, "completions")

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        """Answer POST /v1/chat/completions."""
        return await self._generate(request, "chat")

    async def responses(self, request: web.Request) -> web.StreamResponse:
        """Answer POST /v1/responses."""
        try:
            return await self._generate(request, "responses")
        except (InvalidRequestError, HttpError) as error:
            if request[RECORD].generation is not None:  # the body was read
                name_own_field(error)
            raise

    async def stored_response(self, request: web.Request) -> web.StreamResponse:
        """Refuse what is asked of a response that would have to be stored."""
        raise HttpError(
            404,
            "responses are not stored here, so there is none by that id; send the whole "
            "conversation as input to POST /v1/responses",
            code="response_not_found",
        )

    async def tokenize(self, request: web.Request) -> web.Response:
        """Answer POST /tokenize, which turns text or messages into token ids."""
        body, request[IGNORED] = await self._body_reader().tokenized(request)
        return _json_bytes(body)

    async def detokenize(self, request: web.Request) -> web.Response:
        """Answer POST /detokenize, which turns token ids into text, special tokens included."""
        return _json_bytes(await self._body_reader().detokenized(request))

    async def replicas(self, request: web.Request) -> web.Response:
        """Answer with the state of each replica."""
        return _json({"replicas": self._replica_set(request).replicas()})

    async def control(self, request: web.Request) -> web.Response:
        """Drain, resume or restart a replica, and answer when that is done."""
        replicas = self._replica_set(request)
        number, verb = int(request.match_info["number"]), request.match_info["verb"]
        if number >= len(replicas.replicas()):
            raise HttpError(404, f"there is no replica {number}", code="no_such_replica")
        await {
            "drain": replicas.drain,
            "resume": replicas.resume,
            "restart": replicas.restart,
        }[verb](number)
        return _json({"replicas": replicas.replicas()})

    # --- what the endpoints share ---

    async def _generate(self, request: web.Request, endpoint: Endpoint) -> web.StreamResponse:
        self._ready_engine()
        read = await self._body_reader().generation(endpoint, request)
        generation = GenerationRecord(call=read.call, slo=read.slo, came_s=read.came_s)
        request[RECORD].generation = generation
        engine, call = self._ready_engine(), read.call
        if problem := problem_of(engine, self.config.watchdog_s):
            raise unavailable(problem)
        request[IGNORED] = call.ignored
        handles = engine.submit(
            read.prompts,
            call.params,
            priority=call.priority,
            cache_salt=call.cache_salt,
            slo=read.slo,
            age_s=time.monotonic() - read.came_s,
            bad_word_ids=read.bad_word_ids,
            client=str(request.get(KEY_NUMBER, "")),
        )
        limit = time_limit(self.config.request_timeout_s, read.came_s)
        try:
            reply: Reply | ResponseReply
            if isinstance(call, ResponsesCall):
                reply = ResponseReply(call, handles, self._model_name, engine.tokenizer)
            else:
                reply = Reply(call, handles, self._model_name, engine.tokenizer)
            generation.handles, generation.reply = handles, reply
            if call.stream:
                refusable = read.slo is not None and read.slo.refuses_delay
                return await streamed_response(
                    request,
                    call,
                    reply,
                    handles,
                    limit,
                    refusable=refusable,
                    first_byte_s=self.config.first_byte_s,
                )
            return await whole_response(request, reply, handles, limit)
        finally:
            for handle in handles:
                handle.abort()

    def _replica_set(self, request: web.Request) -> ReplicaSet:
        """Return the engine's replicas, for a client that may give them orders.

        Raises:
            HttpError: 404 without replicas; 403 for a client on another machine without an API key.
        """
        replicas = self._loaded_engine().replica_set
        if replicas is None:
            raise HttpError(
                404,
                "this server has no replicas; start it with --replicas or --engine-process own",
            )
        # Without a key, any user of this machine may give orders.
        if not self.config.has_keys and request.remote not in LOOPBACK:
            raise HttpError(403, "without an API key, replicas are controlled from this machine")
        return replicas

    @property
    def _model_name(self) -> str:
        return self.config.served_model_name or self._loaded_engine().model_name

    def _loaded_engine(self) -> EngineFace:
        if self.engine is None:
            raise unavailable("the model is still loading")
        return self.engine

    def _ready_engine(self) -> EngineFace:
        if self.draining:
            raise EngineStoppedError("the server is shutting down")
        return self._loaded_engine()

    def start_reading(self) -> None:
        """Start the process that reads large bodies, so that no request waits for its start."""
        self._body_reader().start()

    def _body_reader(self) -> BodyReader:
        if self._bodies is None:
            engine = self._loaded_engine()
            facts = Facts(
                model_name=self._model_name,
                tokenizer=engine.tokenizer,
                prompts=engine.prompts,
                max_model_len=engine.max_model_len,
                vocab_size=engine.vocab_size,
                max_queue=engine.config.max_queue,
                sampling_defaults=dict(engine.sampling_defaults),
                slo_classes=dict(engine.slo_classes),
                default_slo=engine.default_slo,
                thinking_marker=engine.thinking_marker,
                chat=find_chat_facts(engine.tokenizer, engine.config),
            )
            self._bodies = BodyReader(facts, int(self.config.max_body_mib * 2**20))
        return self._bodies

    async def _close(self, app: web.Application) -> None:
        if self._bodies is not None:
            await self._bodies.close()

    def _model_card(self) -> dict[str, Any]:
        engine = self._loaded_engine()
        return {
            "id": self._model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "minserve",
            "root": engine.config.model,
            "max_model_len": engine.max_model_len,
            "default_sampling_params": dict(engine.sampling_defaults),
        }


async def _name_ignored(request: web.Request, response: web.StreamResponse) -> None:
    """Name the hints that changed nothing. Their names are the table's, not the client's."""
    if names := request.get(IGNORED, ()):
        response.headers["x-minserve-ignored"] = ", ".join(names)


def _json(value: Any) -> web.Response:
    return _json_bytes(dump_json(value))


def _json_bytes(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")
