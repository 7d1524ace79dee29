// The official Node client.
const OpenAI = require("openai").default;

const model = process.env.MINSERVE_MODEL;
const chat = {
  model, max_tokens: 16, temperature: 0,
  messages: [{ role: "user", content: "Name three colours." }],
};

function check(what, isTrue, told = "") {
  console.log(`${isTrue ? "ok" : "FAILED"}: ${what}${told === "" ? "" : `: ${told}`}`);
  if (!isTrue) process.exit(1);
}

async function checkRaises(what, kind, act, word) {
  try {
    await act();
  } catch (error) {
    check(`${what}: ${kind.name}`, error instanceof kind && error.message.includes(word),
      error.message.slice(0, 300));
    return;
  }
  check(`${what}: ${kind.name}`, false, "nothing was raised");
}

async function main() {
  const client = new OpenAI({ maxRetries: 0 });
  const models = await client.models.list();
  check("models.list", models.data.length === 1 && models.data[0].id === model);

  const answer = await client.chat.completions.create(chat);
  const text = answer.choices[0].message.content;
  check("a chat", text && answer.usage.completion_tokens === 16, text);

  let streamed = "", usage = null;
  const stream = await client.chat.completions.create(
    { ...chat, stream: true, stream_options: { include_usage: true } });
  for await (const chunk of stream) {
    streamed += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  check("the same chat as a stream", streamed === text);
  check("its usage in the last chunk", usage.total_tokens === answer.usage.total_tokens);

  const gathered = client.chat.completions.stream(chat);
  check("the client's own way to gather a stream", await gathered.finalContent() === text);

  const left = await client.chat.completions.create({ ...chat, max_tokens: 2000, stream: true });
  for await (const chunk of left) break; // leaving the loop aborts the request
  check("a stream that is left", left.controller.signal.aborted);

  const ended = await client.completions.create(
    { model, prompt: ["The capital of France is", "One, two, three,"], max_tokens: 8, temperature: 0 });
  check("a list of prompts", ended.choices.length === 2,
    JSON.stringify(ended.choices.map((one) => one.text)));

  const create = (changes) => () => client.chat.completions.create({ ...chat, ...changes });
  await checkRaises("an unknown model", OpenAI.NotFoundError, create({ model: "other" }), "other");
  await checkRaises("a wrong value", OpenAI.BadRequestError, create({ top_p: 7 }), "top_p");
  const wrong = new OpenAI({ apiKey: "wrong", maxRetries: 0 });
  await checkRaises("a wrong key", OpenAI.AuthenticationError, () => wrong.models.list(), "key");
}

main();
