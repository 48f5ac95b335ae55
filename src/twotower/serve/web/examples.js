// Example prompts: forms that the shipped model was trained on, with content of our own.

/**
 * Set for every example: what the denoiser is less sure of waits for another pass. At the model's
 * own threshold most blocks take one or two, and nothing can be seen.
 */
export const EXAMPLE_OPTIONS = { confidence_threshold: 0.99 };

/** In the order in which they are offered; `mode` is not part of them, so they suit any mode. */
export const EXAMPLES = [
  {
    name: "Languages",
    hint: "one sentence, English to Swedish",
    prompt: "Translate to Swedish: Helen has fourteen bottles.\nSwedish:",
  },
  {
    name: "Arithmetic",
    hint: "a word problem, solved step by step",
    prompt:
      "Q: There are 10 birds in a park. 4 fly away and 58 fly in. " +
      "How many birds are there now?\nA:",
  },
  {
    name: "Code",
    hint: "a Python function from its comment",
    prompt: '# Set "rice" to 20 in scores.\ndef put(scores):',
  },
  {
    name: "Editing",
    hint: "rename a function, keep the rest",
    prompt:
      "Edit: Rename the function to do_value.\ndef sum_above_limit(i, j):\n" +
      "    return i + j > 12\nEdited:\n",
  },
  {
    name: "Tool call",
    hint: "a sentence becomes JSON arguments",
    prompt:
      "Tools:\nsend_email(to: string, subject: string)\n" +
      "call_contact(name: string, time: string)\n" +
      "User: Send an email to tom@work.com about the family call.\nCall:",
  },
  {
    name: "Knowledge",
    hint: "a fact about a country",
    prompt: "Question: Which country has the code LB?\nAnswer:",
  },
];
