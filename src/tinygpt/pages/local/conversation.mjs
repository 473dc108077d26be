// A conversation to token ids, as ../../text/chat does it: a template, and a window out of which the
// oldest turns leave first.

// description: {template, harmless, special, stop, stop_ids, room}; window: tokens that the model sees.
export class Conversation {
  constructor(description, tokenizer, window) {
    Object.assign(this, { ...description, tokenizer, window });
    const names = Object.keys(this.special).sort((a, b) => b.length - a.length);
    const escaped = names.map((name) => name.replace(/[.*+?^${}()|[\]\\]/g, '\\$&'));
    this.cut = names.length ? new RegExp(`(${escaped.join('|')})`, 'u') : null;
  }

  // -> {ids, left_out, too_long}: the prompt for the next answer.
  ask(messages, maxTokens) {
    const begin = messages.findIndex(({ role }) => role !== 'system');
    const system = begin < 0 ? messages : messages.slice(0, begin);
    const turns = [];
    for (const message of begin < 0 ? [] : messages.slice(begin)) {
      if (message.role === 'user' || !turns.length) turns.push([]);
      turns.at(-1).push(message);
    }
    const most = this.window - Math.min(maxTokens, Math.floor(this.window / this.room));
    for (let first = 0; ; first++) {
      const ids = this.render([...system, ...turns.slice(first).flat()]);
      if (ids.length > most && first < turns.length - 1) continue;
      return { ids, left_out: turns.slice(0, first).flat().length, too_long: ids.length > this.window };
    }
  }

  render(messages) {
    const { template } = this;
    const ids = [];
    let text = ''; // what no special token parts is encoded as one
    const flush = () => {
      if (text) for (const id of this.tokenizer.encode(text)) ids.push(id);
      text = '';
    };
    const own = (part = '') => {
      for (const piece of this.cut ? part.split(this.cut) : [part]) {
        if (this.special[piece] === undefined) text += piece;
        else {
          flush();
          ids.push(this.special[piece]);
        }
      }
    };
    own(template.start);
    for (const { role, content } of messages) {
      own(template[role]);
      text += this.said(role, content);
      own(template.end);
    }
    own(template.assistant);
    flush();
    return ids;
  }

  said(role, content) {
    const { space } = this.template;
    const neutral = this.harmless.reduce((text, [name, safe]) => text.replaceAll(name, safe), content);
    if (role !== 'assistant' || !space) return neutral;
    return `${space}${neutral.replace(BEGIN, '').replace(END, '')}`.replace(END, '');
  }
}

// What Python's strip() takes off.
const WHITE = '[\\p{White_Space}\\u001c-\\u001f]+';
const BEGIN = new RegExp(`^${WHITE}`, 'u');
const END = new RegExp(`${WHITE}$`, 'u');
