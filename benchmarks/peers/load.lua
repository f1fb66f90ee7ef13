-- A closed loop over the bodies in the folder BODIES, for wrk with one thread: wrk -t1 -cN -dSs -s load.lua URL. Prints a line of JSON.
local folder = os.getenv("BODIES")
local headers = {}
for line in io.lines(folder .. "/headers") do
  local name, value = line:match("^(.-): (.*)$")
  headers[name] = value
end
local bodies = {}
for path in io.lines(folder .. "/list") do
  local file = assert(io.open(path, "rb"))
  bodies[#bodies + 1] = file:read("*a")
  file:close()
end
local least = tonumber(os.getenv("LEAST_BYTES"))
local sent = 0
bad = 0

function request()
  sent = sent % #bodies + 1
  return wrk.format("POST", nil, headers, bodies[sent])
end

function response(status, _, body)
  if status ~= 200 or #body < least then
    bad = bad + 1
  end
end

function setup(thread)
  only = thread
end

function done(summary, latency)
  local errors = summary.errors
  local failed = only:get("bad") + errors.connect + errors.read + errors.write + errors.timeout
  io.write(string.format('{"requests": %d, "seconds": %f, "p50": %f, "p99": %f, "failed": %d}\n', summary.requests,
    summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, failed))
end
