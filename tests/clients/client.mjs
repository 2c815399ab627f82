// The official NATS client for JavaScript speaks our protocol without a line of ours.
import { connect } from "@nats-io/transport-node";
import { Svcm } from "@nats-io/services";

const [url, user, pass, ...calls] = process.argv.slice(2);
const nc = await connect({ servers: url, user, pass });
const out = {};
for (const call of calls) {
  const [name, subject, body] = JSON.parse(call);
  if (name === "discovery") {
    const names = [];
    for await (const info of await new Svcm(nc).client({ strategy: "stall", maxWait: 1000 }).info()) names.push(info);
    out[name] = names;
  } else if (name.startsWith("stream")) {
    const pieces = [];
    for await (const m of await nc.requestMany(subject, JSON.stringify(body), { strategy: "sentinel", maxWait: 60000 }))
      if (m.data.length) pieces.push(m.json());
    out[name] = pieces;
  } else {
    const m = await nc.request(subject, JSON.stringify(body), { timeout: 60000 });
    out[name] = m.data.length ? m.json() : { error: m.headers.get("Nats-Service-Error"), code: m.headers.get("Nats-Service-Error-Code") };
  }
}
console.log(JSON.stringify(out));
await nc.close();
