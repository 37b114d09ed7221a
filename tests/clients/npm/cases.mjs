// What the openai package, as npm has it, gets from an API. Usage: node cases.mjs API KEY CASE; prints JSON.
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const [api, key, name] = process.argv.slice(2);
const client = new OpenAI({ baseURL: api, apiKey: key, maxRetries: 0, timeout: 120_000 });
const model = (await client.models.list()).data[0].id;
const hello = [{ role: "user", content: "Write one short sentence about the sea." }];
const asked = { model, messages: hello, temperature: 0, max_tokens: 24 };
const City = z.object({ name: z.string().max(30), people: z.int().min(0).max(100_000_000) });

async function textOf(stream, onChunk = () => {}) {
  let text = "";
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    onChunk(chunk);
  }
  return text;
}

async function errorOf(ask) {
  try {
    await ask();
  } catch (error) {
    const { status, code, param, type } = error;
    return { kind: error.constructor.name, status, code, param, type, retry: error.headers?.get("retry-after") };
  }
  return null;
}

const cases = {
  async models() {
    const found = [];
    for await (const each of client.models.list()) found.push(each.id);
    return { found, one: (await client.models.retrieve(model)).id };
  },

  async chat() {
    const { data, response } = await client.chat.completions.create(asked).withResponse();
    const [choice] = data.choices;
    return {
      text: choice.message.content,
      reason: choice.finish_reason,
      usage: data.usage,
      status: response.status,
      request: response.headers.get("x-request-id") === data._request_id,
    };
  },

  async stream() {
    const counts = { chunks: 0, usage: null, reason: null };
    const stream = await client.chat.completions.create({
      ...asked,
      stream: true,
      stream_options: { include_usage: true },
    });
    const text = await textOf(stream, (chunk) => {
      counts.chunks += 1;
      counts.usage ??= chunk.usage;
      counts.reason ??= chunk.choices[0]?.finish_reason;
    });
    const helper = client.chat.completions.stream(asked);
    return { text, ...counts, helper: await helper.finalContent() };
  },

  async completions() {
    const body = { model, prompt: ["1, 2, 3,", "a, b, c,"], temperature: 0, max_tokens: 6, logprobs: 1, seed: 1 };
    const whole = await client.completions.create(body);
    const texts = ["", ""];
    for await (const chunk of await client.completions.create({ ...body, stream: true })) {
      for (const choice of chunk.choices) texts[choice.index] += choice.text;
    }
    const first = whole.choices[0].logprobs;
    return { whole: whole.choices.map((choice) => choice.text), texts, tokens: first.tokens.join("") };
  },

  async tools() {
    const got = [];
    const tool = {
      type: "function",
      function: {
        name: "get_population",
        description: "Returns how many people live in a city.",
        parameters: {
          type: "object",
          properties: { city: { type: "string", maxLength: 30 } },
          required: ["city"],
          additionalProperties: false,
        },
        parse: JSON.parse,
        function: ({ city }) => {
          got.push(city);
          return "4321";
        },
      },
    };
    const messages = [
      {
        role: "system",
        content: "You answer questions about cities. Answer in a sentence once you know the number.",
      },
      { role: "user", content: "What is the population of Rome?" },
    ];
    const body = { ...asked, messages, tools: [tool], max_tokens: 60 };
    const whole = client.chat.completions.runTools(body, { maxChatCompletions: 4 });
    const text = await whole.finalContent();
    const roles = whole.messages.map((message) => message.role);
    const streamed = client.chat.completions.runTools({ ...body, stream: true }, { maxChatCompletions: 4 });
    return { got, text, roles, streamed: await streamed.finalContent() };
  },

  async structured() {
    const messages = [{ role: "user", content: "Describe the city of Rome as JSON with its name and people." }];
    const body = { ...asked, messages, max_tokens: 80, response_format: zodResponseFormat(City, "city") };
    const whole = await client.chat.completions.parse(body);
    const streamed = await client.chat.completions.stream(body).finalChatCompletion();
    return { parsed: whole.choices[0].message.parsed, streamed: streamed.choices[0].message.parsed };
  },

  async responses() {
    const body = { model, input: hello[0].content, temperature: 0, max_output_tokens: 24 };
    const whole = await client.responses.create(body);
    const events = [];
    for await (const event of await client.responses.create({ ...body, stream: true })) events.push(event);
    const { response } = events.at(-1);
    const again = [];
    const rest = await client.responses.retrieve(response.id, { stream: true, starting_after: 5 });
    for await (const event of rest) again.push(event);
    const helper = await client.responses.stream(body).finalResponse();
    const input = "Rome as JSON with its name and people.";
    const parsed = await client.responses.parse({
      ...body,
      input,
      max_output_tokens: 80,
      text: { format: zodTextFormat(City, "city") },
    });
    const later = await client.responses.create({ ...body, input: "Say it again.", previous_response_id: whole.id });
    let background = await client.responses.create({ ...body, background: true });
    const first = background.status;
    while (["queued", "in_progress"].includes(background.status)) {
      await new Promise((done) => setTimeout(done, 100));
      background = await client.responses.retrieve(background.id);
    }
    await client.responses.delete(whole.id);
    return {
      text: whole.output_text,
      status: whole.status,
      usage: whole.usage,
      numbers: events.map((event) => event.sequence_number),
      last: events.at(-1).type,
      deltas: events.filter((event) => event.type === "response.output_text.delta").map((event) => event.delta),
      again: again.map((event) => event.sequence_number),
      helper: helper.output_text,
      parsed: parsed.output_parsed,
      later: [later.usage.input_tokens, later.previous_response_id === whole.id],
      background: [first, background.output_text],
      gone: await errorOf(() => client.responses.retrieve(whole.id)),
    };
  },

  async errors() {
    const chat = (change, to = client) => to.chat.completions.create({ ...asked, ...change });
    const held = await chat({ max_tokens: 5_000, ignore_eos: true, stream: true });
    const limit = await errorOf(() => chat({}));
    held.controller.abort();
    return {
      limit,
      bad: await errorOf(() => chat({ temperature: -1 })),
      long: await errorOf(() => chat({ messages: [{ role: "user", content: "sea ".repeat(40_000) }] })),
      key: await errorOf(() => chat({}, client.withOptions({ apiKey: "wrong" }))),
      model: await errorOf(() => chat({ model: "huge" })),
      stream: await errorOf(() => chat({ model: "huge", stream: true })),
      schema: await errorOf(() =>
        chat({ response_format: { type: "json_schema", json_schema: { name: "a", schema: { type: "nothing" } } } }),
      ),
    };
  },

  async abort() {
    const body = { ...asked, max_tokens: 5_000, ignore_eos: true, stream: true };
    const stream = await client.chat.completions.create(body);
    let chunks = 0;
    for await (const _ of stream) {
      chunks += 1;
      if (chunks === 5) stream.controller.abort();
    }
    const helper = client.chat.completions.stream(body);
    helper.on("content", () => helper.abort());
    const kind = await errorOf(() => helper.done());
    const signal = AbortSignal.timeout(1_500);
    const whole = await errorOf(() => client.chat.completions.create({ ...body, stream: false }, { signal }));
    return { chunks, kind: kind?.kind, whole: whole?.kind };
  },
};

console.log(JSON.stringify(await cases[name]()));
