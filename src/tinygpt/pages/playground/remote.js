// The model behind a server. The playground knows a model, this one or ../local/local.js, as
//
//   start() -> card                            card.can says what else it does: attention, api
//   tokens(text, signal) -> [{id, text, bytes}]      how the tokenizer cuts a text, or its end
//   conversation(messages, max_tokens, signal) -> {tokens, remark, stop, stop_ids}    the prompt for an answer
//   generate(prompt, settings, signal)         yields {prompt: tokens}, {tokens}, {finish_reason}
//   candidates(prompt, settings, signal) -> {candidates, chosen, kept, vocabulary}
//   attention(prompt, {layer, last}, signal)   where card.can.attention
//   beginnings() -> [text]                     to begin with
//
// A prompt is {ids, text}: tokens that are certain, and the text behind them, which is encoded.

import { events, post } from "../shared/net.js";

export const remote = {
  start: () => post("api/model", {}),
  tokens: async (text, signal) => (await post("api/tokens", { text }, signal)).tokens,
  conversation: (messages, max_tokens, signal) => post("api/conversation", { messages, max_tokens }, signal),
  generate: (prompt, settings, signal) => events("api/generate", { ...prompt, ...settings }, signal),
  candidates: (prompt, settings, signal) => post("api/candidates", { ...prompt, ...settings }, signal),
  attention: (prompt, which, signal) => post("api/attention", { ...prompt, ...which }, signal),
  beginnings: async () => (await post("api/beginnings", {})).beginnings,
};
