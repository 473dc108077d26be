// The same forward pass on a graphics card, where the browser lends one.

export class WebGPU {
  // described: see shaders.py; wasm has the weights. null where there is no card, or it is too small.
  static async load(described, wasm) {
    const adapter = await globalThis.navigator?.gpu?.requestAdapter();
    const largest = Math.max(...described.buffers);
    if (!adapter || adapter.limits.maxStorageBufferBindingSize < largest) return null;
    const device = await adapter.requestDevice({
      requiredLimits: { maxStorageBufferBindingSize: largest, maxBufferSize: largest },
    });
    const made = new WebGPU(device, described, wasm);
    await made.prepare(described);
    return made;
  }

  constructor(device, described, wasm) {
    const { STORAGE, COPY_DST, COPY_SRC, UNIFORM, MAP_READ } = GPUBufferUsage;
    const make = (size, usage) => device.createBuffer({ size, usage });
    this.device = device;
    this.ids = new Int32Array(wasm.ids.length);
    this.out = new Float32Array(wasm.out.length);
    this.buffers = described.buffers.map((size) => make(size, STORAGE | COPY_DST | COPY_SRC));
    this.idBuffer = this.buffers[described.ids];
    this.back = make(this.out.byteLength, MAP_READ | COPY_DST);
    this.infinity = make(4, UNIFORM | COPY_DST);
    device.queue.writeBuffer(this.infinity, 0, new Float32Array([Infinity]));
    this.variables = { position: make(4, UNIFORM | COPY_DST), last: make(4, UNIFORM | COPY_DST) };
    for (const [number, at, size] of described.weights) {
      const start = wasm.module.weights() + at;
      device.queue.writeBuffer(this.buffers[number], 0, wasm.memory, start, size);
    }
  }

  async prepare(described) {
    const { device } = this;
    const layouts = new Map(); // by numbers of buffers and of variables
    const pipelines = new Map(); // by kernel
    const layoutOf = (storage, uniform) => {
      const key = `${storage} ${uniform}`;
      if (!layouts.has(key)) {
        const kinds = ['uniform', ...Array(storage).fill('storage'), ...Array(uniform).fill('uniform')];
        const entries = kinds.map((type, binding) => ({
          binding,
          visibility: GPUShaderStage.COMPUTE,
          buffer: { type },
        }));
        layouts.set(key, device.createBindGroupLayout({ entries }));
      }
      return layouts.get(key);
    };
    const ready = async ([kernel, buffers, variables, groups]) => {
      const layout = layoutOf(buffers.length, variables.length);
      if (!pipelines.has(kernel)) {
        const module = device.createShaderModule({ code: described.kernels[kernel] });
        const pipelineLayout = device.createPipelineLayout({ bindGroupLayouts: [layout] });
        pipelines.set(
          kernel,
          device.createComputePipelineAsync({ layout: pipelineLayout, compute: { module } }),
        );
      }
      const resources = [
        { buffer: this.infinity },
        ...buffers.map(([number, offset, size]) => ({ buffer: this.buffers[number], offset, size })),
        ...variables.map((name) => ({ buffer: this.variables[name] })),
      ];
      const entries = resources.map((resource, binding) => ({ binding, resource }));
      const group = device.createBindGroup({ layout, entries });
      return { pipeline: await pipelines.get(kernel), group, groups };
    };
    for (const name of ['step', 'window']) {
      const launches = await Promise.all(described[name].launches.map(ready));
      this[name] = (value) => this.run(launches, described[name].result, value);
    }
  }

  async run(launches, [number, offset, size], value) {
    const { device } = this;
    device.queue.writeBuffer(this.idBuffer, 0, this.ids);
    for (const buffer of Object.values(this.variables)) {
      device.queue.writeBuffer(buffer, 0, new Int32Array([value]));
    }
    const encoder = device.createCommandEncoder();
    const pass = encoder.beginComputePass();
    for (const { pipeline, group, groups } of launches) {
      pass.setPipeline(pipeline);
      pass.setBindGroup(0, group);
      pass.dispatchWorkgroups(...groups.map(([constant, factor]) => constant + factor * value));
    }
    pass.end();
    encoder.copyBufferToBuffer(this.buffers[number], offset, this.back, 0, size);
    device.queue.submit([encoder.finish()]);
    await this.back.mapAsync(GPUMapMode.READ);
    this.out.set(new Float32Array(this.back.getMappedRange()));
    this.back.unmap();
  }
}

// The quicker of the two, or the processor where the card is not right. -> [runner, its name]
export async function choose(wasm, described) {
  if (!described) return [wasm, 'processor'];
  try {
    const gpu = await WebGPU.load(described, wasm);
    if (!gpu) return [wasm, 'processor'];
    const taken = async (runner, times) => {
      const began = performance.now();
      for (let i = 0; i < times; i++) await runner.step(i);
      return (performance.now() - began) / times;
    };
    gpu.ids[0] = wasm.ids[0] = 1;
    await Promise.all([gpu.step(0), wasm.step(0)]);
    const differ = gpu.out.some((x, i) => !(Math.abs(x - wasm.out[i]) <= 1e-2));
    const quicker = !differ && (await taken(gpu, 5)) < (await taken(wasm, 3));
    if (quicker) return [gpu, 'graphics card'];
    gpu.device.destroy();
  } catch {
    // a driver that cannot do it is no reason not to write
  }
  return [wasm, 'processor'];
}
