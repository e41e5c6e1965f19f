// The server's answers. An error is a line in the page's alert region.

async function answer(response) {
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  throw new Error(said.error ?? `the server answered ${response.status}`);
}

async function request(path, options) {
  try {
    return await answer(await fetch(`api/${path}`, options));
  } catch (error) {
    if (error instanceof TypeError) throw new Error("The studio does not answer: is pldr studio still running in the terminal?");
    throw error;
  }
}

/** GET, or POST where there is a body; the answer's JSON. */
export async function ask(path, body, signal) {
  const post = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  return (await request(path, body === undefined ? { signal } : { ...post, signal })).json();
}

/** POST; yields the objects of a stream of lines as they come. */
export async function* stream(path, body, signal) {
  const response = await request(path, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    const lines = (rest + (value ?? "")).split("\n");
    rest = done ? "" : lines.pop();
    for (const line of lines) {
      if (!line.trim()) continue;
      const said = JSON.parse(line);
      if (said.error) throw new Error(said.error);
      yield said;
    }
    if (done) return;
  }
}

/** POST a file as it is. */
export async function upload(path, file) {
  const headers = { "Content-Type": "application/octet-stream", "X-File-Name": encodeURIComponent(file.name) };
  return (await request(path, { method: "POST", headers, body: file })).json();
}

/** base64 of float32, little-endian, as the server sends tensors. */
export function floats(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

/** `work(signal, ...)` that gives up what it was doing when it is called again, and reports errors once. */
export function latest(work) {
  let current = new AbortController();
  const run = async (...given) => {
    current.abort();
    const mine = (current = new AbortController());
    try {
      report("");
      return await work(mine.signal, ...given);
    } catch (error) {
      if (mine.signal.aborted) return undefined;
      report(error.message);
      return undefined;
    }
  };
  run.stop = () => current.abort();
  return run;
}

export function report(message) {
  document.getElementById("error").textContent = message;
}
