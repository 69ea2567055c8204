// Runs the cases of a client's script and prints which passed, as one line of JSON.
export const URL = process.env.XVERSE_URL;
export const QUESTION = "What is your name?";

export async function run(cases) {
  const passed = [], failed = {};
  for (const [name, check] of Object.entries(cases)) {
    try {
      await check();
      passed.push(name);
    } catch (error) {
      failed[name] = String(error).replace(/\s+/g, " ").slice(0, 300);
    }
  }
  console.log(JSON.stringify({ passed, failed }));
  process.exit(0);
}

export function assert(condition, text) {
  if (!condition) throw new Error(text);
}
