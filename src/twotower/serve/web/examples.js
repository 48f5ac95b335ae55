// Example prompts: forms that the shipped model was trained on, with content of our own.

/** In the order in which they are offered; `mode` is not part of them, so they suit any mode. */
export const EXAMPLES = [
  {
    name: "Arithmetic",
    hint: "a word problem, solved step by step",
    prompt:
      "Q: Zoe has 70 buttons. She buys 10 more and loses 15. " +
      "How many buttons does Zoe have now?\nA:",
  },
  {
    name: "Code",
    hint: "a Python function from its comment",
    prompt: "# Return the items of numbers that are at most 73.\ndef at_most(numbers):",
  },
  {
    name: "Editing",
    hint: "rename a variable, keep the rest",
    prompt:
      "Edit: Rename data to values.\ndef find(data):\n    if 8 in data:\n" +
      "        return data.index(8)\n    return -1\nEdited:\n",
  },
  {
    name: "Tool call",
    hint: "a sentence becomes JSON arguments",
    prompt:
      "Tools:\ntranslate(text: string, language: string)\n" +
      "book_flight(from: string, to: string, date: string)\n" +
      "User: Book a flight from Lima to Madrid on 2025-07-23.\nCall:",
  },
  {
    name: "Languages",
    hint: "one sentence, English to German",
    prompt: "Translate to German: Diana sees nineteen trees.\nGerman:",
  },
  {
    name: "Knowledge",
    hint: "a fact about a country",
    prompt: "Question: What money do people use in Vietnam?\nAnswer:",
  },
];
