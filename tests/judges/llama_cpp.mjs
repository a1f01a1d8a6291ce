// llama.cpp through node-llama-cpp, for test_llama_cpp.py: a file with a list of jobs in JSON, a file for their answers.
// A job: {model, lora?, prompts?: [[id]], texts?: [text], special?: bool, generate?: {ids, count}}; its answer:
// {logits: [[[number]]], ids: [[id]], generated: [id], text, bos, context} or {error}. The cache of keys and values is F32.
// Or {go: template, values}, for Go's text/template as Ollama has it: {text}.
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";
import path from "node:path";
import fs from "node:fs";

const {resolve} = createRequire(path.join(process.env.LLAMA_CPP_NODE, "node_modules", "anchor.js"));
const load = (name) => import(pathToFileURL(resolve(name)).href);
const {getLlama, LlamaLogLevel} = await load("node-llama-cpp");
const said = [];
const llama = await getLlama({
    gpu: false, build: "never", maxThreads: 2, numa: false, logLevel: LlamaLogLevel.warn,
    logger: (level, message) => said.push(message.trim())
});

async function answer(job) {
    if (job.go) return {text: await (await load("@evertdespiegeleer/go-template")).parse(job.go, job.values)};
    const model = await llama.loadModel({modelPath: job.model, useMmap: false});
    const found = {bos: model.tokens.bos, context: model.trainContextSize, name: model.fileInfo.metadata.general.name};
    found.ids = (job.texts ?? []).map((text) => model.tokenize(text, job.special ?? false));
    found.back = found.ids.map((ids) => model.detokenize(ids, true));
    const longest = Math.max(...(job.prompts ?? []).map((ids) => ids.length), (job.generate?.ids.length ?? 0) + (job.generate?.count ?? 0)) + 8;
    const context = await model.createContext({
        contextSize: longest, batchSize: longest, threads: 1, sequences: 1, flashAttention: false,
        experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32",
        ...(job.lora ? {lora: job.lora} : {})
    });
    const sequence = context.getSequence();
    found.logits = [];
    for (const ids of job.prompts ?? []) {
        await sequence.clearHistory();
        const results = await sequence.controlledEvaluate(ids.map((id) => [id, {generateNext: {logits: true}}]));
        found.logits.push(results.map((result) => {
            const row = [];
            for (const [token, logit] of result.next.logits) row[token] = logit;
            return row;
        }));
    }
    if (job.generate) {
        await sequence.clearHistory();
        found.generated = [];
        for await (const token of sequence.evaluate(job.generate.ids, {temperature: 0})) {
            if (model.isEogToken(token) || found.generated.length === job.generate.count) break;
            found.generated.push(token);
        }
        found.text = model.detokenize(found.generated);
    }
    await context.dispose();
    await model.dispose();
    return found;
}

const answers = [];
for (const job of JSON.parse(fs.readFileSync(process.argv[2], "utf8"))) {
    said.length = 0;
    try {
        answers.push(await answer(job));
    } catch (error) {
        answers.push({error: [error.message, ...said].join("\n")});
    }
}
fs.writeFileSync(process.argv[3], JSON.stringify(answers));
process.exit(0);
