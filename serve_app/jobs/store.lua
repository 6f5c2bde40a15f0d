#!lua name=wan_serve_VERSION
-- The JobStore's atomic moves. VERSION is replaced by a hash of this file, so that services of two versions share a store.
-- KEYS[1] is the key prefix; every other key is derived from it.
-- Job fields are JSON texts, which Lua compares but never rebuilds. Time is the server's, so that leases have one clock.

local MAX_EVENTS = 5000

local function now()
  local t = redis.call('TIME')
  return tonumber(t[1]) + tonumber(t[2]) / 1000000
end

local function job_key(prefix, id) return prefix .. ':job:' .. id end
local function events_key(prefix, id) return prefix .. ':events:' .. id end

local function index_keys(prefix, id, owner, type, status)
  local base = prefix .. ':index:' .. owner .. ':'
  return { base .. '*:*', base .. '*:' .. type, base .. status .. ':*', base .. status .. ':' .. type }
end

local function owner_and_type(prefix, id)
  local found = redis.call('HMGET', job_key(prefix, id), 'owner', 'type_')
  return cjson.decode(found[1]), found[2]
end

local function emit(prefix, id, name, data)
  redis.call('XADD', events_key(prefix, id), 'MAXLEN', '~', MAX_EVENTS, '*', 'name', name, 'data', data)
  redis.call('PUBLISH', prefix .. ':events', id)
end

local function set_status(prefix, id, old, new)
  local owner, type = owner_and_type(prefix, id)
  local before, after = index_keys(prefix, id, owner, type, old), index_keys(prefix, id, owner, type, new)
  redis.call('ZREM', before[3], id)
  redis.call('ZREM', before[4], id)
  redis.call('ZADD', after[3], 0, id)
  redis.call('ZADD', after[4], 0, id)
  redis.call('HSET', job_key(prefix, id), 'status', cjson.encode(new))
end

-- Each model has two queues, both by deadline: a job is moved to the late one when it can no longer be done in time, at its
-- latest start.
local function queue_keys(prefix, model)
  return prefix .. ':queue:' .. model, prefix .. ':late:' .. model, prefix .. ':latest_start:' .. model
end

local function enqueue(prefix, id)
  local found = redis.call('HMGET', job_key(prefix, id), 'model_', 'deadline', 'estimated_gpu_s')
  local queue, _, latest_start = queue_keys(prefix, found[1])
  redis.call('ZADD', queue, found[2], id)
  redis.call('ZADD', latest_start, tonumber(found[2]) - tonumber(found[3]), id)
  redis.call('SADD', prefix .. ':models', found[1])
end

local function dequeue(prefix, id)
  local model = redis.call('HGET', job_key(prefix, id), 'model_')
  local queue, late, latest_start = queue_keys(prefix, model)
  for _, key in ipairs({ queue, late, latest_start }) do redis.call('ZREM', key, id) end
  if redis.call('EXISTS', queue, late) == 0 then redis.call('SREM', prefix .. ':models', model) end
end

local function move_late_jobs(prefix, model)
  local queue, late, latest_start = queue_keys(prefix, model)
  local ids = redis.call('ZRANGE', latest_start, '-inf', now(), 'BYSCORE', 'LIMIT', 0, 100)
  for _, id in ipairs(ids) do
    redis.call('ZADD', late, redis.call('ZSCORE', queue, id), id)
    redis.call('ZREM', queue, id)
    redis.call('ZREM', latest_start, id)
  end
end

-- Jobs that wait, by model: a flat list of names and numbers.
local function queued_by_model(prefix)
  local rows = {}
  for _, model in ipairs(redis.call('SMEMBERS', prefix .. ':models')) do
    local queue, late = queue_keys(prefix, model)
    rows[#rows + 1] = model
    rows[#rows + 1] = redis.call('ZCARD', queue) + redis.call('ZCARD', late)
  end
  return rows
end

local function earliest(key, horizon)
  return redis.call('ZRANGE', key, '-inf', horizon, 'BYSCORE', 'LIMIT', 0, 1)[1]
end

local function set_fields(prefix, id, argv, first)
  if argv[first] then redis.call('HSET', job_key(prefix, id), unpack(argv, first)) end
end

local function status_of(prefix, id)
  local status = redis.call('HGET', job_key(prefix, id), 'status')
  return status and cjson.decode(status)
end

-- Whether `token` still drives the job: 'ok', 'cancel' (ok, but its user wants it stopped) or 'lost'.
local function standing(prefix, id, token)
  local found = redis.call('HMGET', job_key(prefix, id), 'status', 'fencing_token', 'cancel_requested')
  if found[1] ~= '"running"' or found[2] ~= token then return 'lost' end
  if found[3] == 'true' then return 'cancel' end
  return 'ok'
end

-- Host and port that the job's webhook goes to, or nil where it has none.
local function receiver_of(prefix, id)
  local webhook = redis.call('HGET', job_key(prefix, id), 'webhook')
  if not webhook or webhook == 'null' then return nil end
  return string.match(cjson.decode(webhook).url, '^%a+://([^/?#]+)')
end

-- Make the job's webhook due at a moment, or never (nil). Receivers queue by the first of theirs, so that a receiver with
-- thousands that wait holds up no other.
local function schedule_webhook(prefix, receiver, id, due)
  local outbox, own = prefix .. ':outbox', prefix .. ':outbox:' .. receiver
  if due then redis.call('ZADD', own, string.format('%.6f', due), id) else redis.call('ZREM', own, id) end
  local first = redis.call('ZRANGE', own, 0, 0, 'WITHSCORES')
  if first[1] then redis.call('ZADD', outbox, first[2], receiver) else redis.call('ZREM', outbox, receiver) end
end

local function end_job(prefix, id, status, name, data)
  local moment = string.format('%.3f', now())
  redis.call('ZREM', prefix .. ':leases', id)
  dequeue(prefix, id)
  redis.call('ZADD', prefix .. ':finished', moment, id)
  redis.call('ZADD', prefix .. ':unsettled', moment, id)
  redis.call('HSET', job_key(prefix, id), 'finished_at', moment, 'stage', 'null')
  set_status(prefix, id, status_of(prefix, id), status)
  emit(prefix, id, name, data)
  local receiver = receiver_of(prefix, id)
  if receiver then
    schedule_webhook(prefix, receiver, id, now())
    redis.call('PUBLISH', prefix .. ':outbox', id)
  end
end

local function back_to_queue(prefix, id, reason)
  redis.call('ZREM', prefix .. ':leases', id)
  redis.call('HSET', job_key(prefix, id), 'stage', 'null')
  set_status(prefix, id, 'running', 'queued')
  enqueue(prefix, id)
  emit(prefix, id, 'queued', cjson.encode({ status = 'queued', reason = reason }))
  redis.call('PUBLISH', prefix .. ':work', id)
end

-- A request that is to be done once has a name, a fingerprint and a ttl in seconds; an empty name: every time anew.
-- The id of the job that a request of that name made or changed, 'conflict' if it was another request, or nil.
local function recall(prefix, name, fingerprint)
  local found = name ~= '' and redis.call('GET', prefix .. ':once:' .. name)
  if not found then return nil end
  local before, id = string.match(found, '^(%S+) (%S+)$')
  return before == fingerprint and id or 'conflict'
end

local function remember(prefix, name, fingerprint, ttl_s, id)
  if name ~= '' then redis.call('SET', prefix .. ':once:' .. name, fingerprint .. ' ' .. id, 'EX', ttl_s) end
end

-- submit: id, owner, type, model, clips, max_queued, event data, name, fingerprint, ttl_s, field, value, ...
-- -> 'ok' | 'full' | 'conflict' | the id of the job that this very request made before
local function submit(keys, argv)
  local prefix, id, owner, type = keys[1], argv[1], argv[2], argv[3]
  local before = recall(prefix, argv[8], argv[9])
  if before then return before end
  local queued, rows = 0, queued_by_model(prefix)
  for i = 2, #rows, 2 do queued = queued + rows[i] end
  if queued >= tonumber(argv[6]) then return 'full' end
  remember(prefix, argv[8], argv[9], argv[10], id)
  set_fields(prefix, id, argv, 11)
  redis.call('HSET', job_key(prefix, id), 'type_', type, 'model_', argv[4], 'clips_', argv[5])
  for _, key in ipairs(index_keys(prefix, id, owner, type, 'queued')) do redis.call('ZADD', key, 0, id) end
  enqueue(prefix, id)
  emit(prefix, id, 'queued', argv[7])
  redis.call('PUBLISH', prefix .. ':work', id)
  return 'ok'
end

-- claim: model, horizon, horizon of late jobs, lease_s -> the job's fields and values, or nothing. Earliest deadline first,
-- none past its horizon, late jobs only where no other may be claimed.
local function claim(keys, argv)
  local prefix = keys[1]
  move_late_jobs(prefix, argv[1])
  local queue, late = queue_keys(prefix, argv[1])
  local id = earliest(queue, argv[2]) or earliest(late, argv[3])
  if not id then return {} end
  local key, moment = job_key(prefix, id), now()
  local token = redis.call('INCR', prefix .. ':fencing_token')
  if redis.call('HGET', key, 'fencing_token') ~= '0' then redis.call('HSET', key, 'superseded_', 'true') end
  dequeue(prefix, id)
  redis.call('ZADD', prefix .. ':leases', moment + tonumber(argv[4]), id)
  redis.call('HSET', key, 'fencing_token', token)
  local attempts = redis.call('HINCRBY', key, 'attempts', 1)
  if redis.call('HGET', key, 'started_at') == 'null' then
    redis.call('HSET', key, 'started_at', string.format('%.3f', moment))
  end
  set_status(prefix, id, 'queued', 'running')
  emit(prefix, id, 'running', cjson.encode({ status = 'running', attempt = attempts }))
  return redis.call('HGETALL', key)
end

-- heartbeat: lease_s, id, token, id, token, ... -> for each 'ok' | 'cancel' | 'lost'
local function heartbeat(keys, argv)
  local prefix, answers = keys[1], {}
  local until_ = now() + tonumber(argv[1])
  for i = 2, #argv, 2 do
    local answer = standing(prefix, argv[i], argv[i + 1])
    if answer ~= 'lost' then redis.call('ZADD', prefix .. ':leases', until_, argv[i]) end
    answers[#answers + 1] = answer
  end
  return answers
end

-- standings: id, token, id, token, ... -> for each 'ok' | 'cancel' | 'lost', changing nothing
local function standings(keys, argv)
  local answers = {}
  for i = 1, #argv, 2 do answers[#answers + 1] = standing(keys[1], argv[i], argv[i + 1]) end
  return answers
end

-- write: id, token, event name ('' for none), event data, field, value, ... -> 'ok' | 'cancel' | 'lost'
local function write(keys, argv)
  local prefix, id = keys[1], argv[1]
  local answer = standing(prefix, id, argv[2])
  if answer == 'lost' then return answer end
  set_fields(prefix, id, argv, 5)
  if argv[3] ~= '' then emit(prefix, id, argv[3], argv[4]) end
  return answer
end

-- finish: id, token, status, event data, field, value, ... -> 'ok' | 'lost'
local function finish(keys, argv)
  local prefix, id = keys[1], argv[1]
  if standing(prefix, id, argv[2]) == 'lost' then return 'lost' end
  set_fields(prefix, id, argv, 5)
  end_job(prefix, id, argv[3], argv[3], argv[4])
  return 'ok'
end

-- requeue: id, token, reason -> 'ok' | 'lost'; the attempt does not count
local function requeue(keys, argv)
  local prefix, id = keys[1], argv[1]
  if standing(prefix, id, argv[2]) == 'lost' then return 'lost' end
  redis.call('HINCRBY', job_key(prefix, id), 'attempts', -1)
  back_to_queue(prefix, id, argv[3])
  return 'ok'
end

-- reap: reason -> ids whose lease had run out; they are queued again (or cancelled, where that was asked for)
local function reap(keys, argv)
  local prefix = keys[1]
  local late = redis.call('ZRANGE', prefix .. ':leases', '-inf', now(), 'BYSCORE', 'LIMIT', 0, 100)
  for _, id in ipairs(late) do
    if redis.call('HGET', job_key(prefix, id), 'cancel_requested') == 'true' then
      end_job(prefix, id, 'cancelled', 'cancelled', cjson.encode({ status = 'cancelled' }))
    else
      redis.call('HINCRBY', job_key(prefix, id), 'lost_conductors', 1)
      back_to_queue(prefix, id, argv[1])
    end
  end
  return late
end

-- cancel: id, name, fingerprint, ttl_s -> 'missing' | 'finished' | 'conflict' | 'again' | 'cancelled' | 'requested'
local function cancel(keys, argv)
  local prefix, id = keys[1], argv[1]
  local before = recall(prefix, argv[2], argv[3])
  if before then return before == id and 'again' or 'conflict' end
  local status = status_of(prefix, id)
  if not status then return 'missing' end
  if status ~= 'queued' and status ~= 'running' then return 'finished' end
  remember(prefix, argv[2], argv[3], argv[4], id)
  if status == 'queued' then
    end_job(prefix, id, 'cancelled', 'cancelled', cjson.encode({ status = 'cancelled' }))
    return 'cancelled'
  end
  redis.call('HSET', job_key(prefix, id), 'cancel_requested', 'true')
  redis.call('PUBLISH', prefix .. ':cancel', id)
  return 'requested'
end

-- delete: id -> 'missing' | 'active' | 'ok'
local function delete(keys, argv)
  local prefix, id = keys[1], argv[1]
  local status = status_of(prefix, id)
  if not status then return 'missing' end
  if status == 'queued' or status == 'running' then return 'active' end
  local owner, type = owner_and_type(prefix, id)
  for _, key in ipairs(index_keys(prefix, id, owner, type, status)) do redis.call('ZREM', key, id) end
  local receiver = receiver_of(prefix, id)
  if receiver then schedule_webhook(prefix, receiver, id, nil) end
  redis.call('ZREM', prefix .. ':finished', id)
  redis.call('ZREM', prefix .. ':unsettled', id)
  redis.call('UNLINK', job_key(prefix, id), events_key(prefix, id))
  return 'ok'
end

-- hold: name, holder, for_s, shared ('1' or '0') -> 1 if `holder` has the lock of that name now, until it was silent for so
-- long; else 0. Shared, it is had beside other sharers. One that wants it alone is asked to wait for those, and from
-- then on no further one comes in.
local function hold(keys, argv)
  local alone, sharers = keys[1] .. ':lock:' .. argv[1], keys[1] .. ':sharers:' .. argv[1]
  local moment, lease_ms = now(), math.ceil(tonumber(argv[3]) * 1000)
  redis.call('ZREMRANGEBYSCORE', sharers, '-inf', moment)
  local holder = redis.call('GET', alone)
  if argv[4] == '1' then
    if holder and not redis.call('ZSCORE', sharers, argv[2]) then return 0 end
    redis.call('ZADD', sharers, string.format('%.3f', moment + lease_ms / 1000), argv[2])
    redis.call('PEXPIRE', sharers, lease_ms)
    return 1
  end
  if holder and holder ~= argv[2] then return 0 end
  redis.call('SET', alone, argv[2], 'PX', lease_ms)
  redis.call('ZREM', sharers, argv[2])
  return redis.call('ZCARD', sharers) == 0 and 1 or 0
end

-- release: name, holder
local function release(keys, argv)
  local key = keys[1] .. ':lock:' .. argv[1]
  if redis.call('GET', key) == argv[2] then redis.call('DEL', key) end
  redis.call('ZREM', keys[1] .. ':sharers:' .. argv[1], argv[2])
end

-- expired: retention_s ('inf' for ever), most, skip, limit -> ids of finished jobs, oldest first, that are older or too many
local function expired(keys, argv)
  local key = keys[1] .. ':finished'
  local old = redis.call('ZCOUNT', key, '-inf', argv[1] == 'inf' and '-inf' or now() - tonumber(argv[1]))
  local count = math.max(old, redis.call('ZCARD', key) - tonumber(argv[2]))
  local last = math.min(count, tonumber(argv[3]) + tonumber(argv[4])) - 1
  if last < tonumber(argv[3]) then return {} end
  return redis.call('ZRANGE', key, argv[3], last)
end

-- unsettled: age_s, skip, limit -> id, status, fencing token, '1' if it had other attempts; of jobs finished so long ago
local function unsettled(keys, argv)
  local prefix, rows = keys[1], {}
  local before = now() - tonumber(argv[1])
  local ids = redis.call('ZRANGE', prefix .. ':unsettled', '-inf', before, 'BYSCORE', 'LIMIT', argv[2], argv[3])
  for _, id in ipairs(ids) do
    local found = redis.call('HMGET', job_key(prefix, id), 'status', 'fencing_token', 'superseded_')
    for _, value in ipairs({ id, found[1], found[2], found[3] and '1' or '0' }) do rows[#rows + 1] = value end
  end
  return rows
end

-- settle: id. Keeps the story of a finished job and drops how its bar moved. The stream is written anew under the same
-- ids, because deleting single entries gives no memory back; and restored from its dump, because a stream that is still
-- written to reserves 4 KiB.
local function settle(keys, argv)
  local prefix, id = keys[1], argv[1]
  local key = events_key(prefix, id)
  redis.call('ZREM', prefix .. ':unsettled', id)
  local events = redis.call('XRANGE', key, '-', '+')
  redis.call('UNLINK', key)
  for _, event in ipairs(events) do
    local name = event[2][2]
    if name ~= 'progress' and name ~= 'preview' then redis.call('XADD', key, event[1], unpack(event[2])) end
  end
  local story = redis.call('DUMP', key)
  if story then redis.call('RESTORE', key, 0, story, 'REPLACE') end
  return 'ok'
end

local function forget_silent_replicas(prefix)
  for _, id in ipairs(redis.call('ZRANGE', prefix .. ':replicas', '-inf', now(), 'BYSCORE')) do
    redis.call('ZREM', prefix .. ':replicas', id)
    redis.call('HDEL', prefix .. ':replica_reports', id)
  end
end

-- report_replica: id, ttl_s, report
local function report_replica(keys, argv)
  forget_silent_replicas(keys[1])
  redis.call('ZADD', keys[1] .. ':replicas', now() + tonumber(argv[2]), argv[1])
  redis.call('HSET', keys[1] .. ':replica_reports', argv[1], argv[3])
  return 'ok'
end

-- live_replicas -> the reports of the replicas that reported within their ttl
local function live_replicas(keys)
  forget_silent_replicas(keys[1])
  return redis.call('HVALS', keys[1] .. ':replica_reports')
end

local WORK = { 'model_', 'clips_', 'deadline', 'estimated_gpu_s', 'stage', 'clips_to_make_' }

-- Of each job its id and WORK, in one flat list.
local function work_of(prefix, ids)
  local rows = {}
  for _, id in ipairs(ids) do
    rows[#rows + 1] = id
    for _, value in ipairs(redis.call('HMGET', job_key(prefix, id), unpack(WORK))) do rows[#rows + 1] = value end
  end
  return rows
end

-- running -> the work of every job under a lease
local function running(keys)
  return work_of(keys[1], redis.call('ZRANGE', keys[1] .. ':leases', 0, -1))
end

-- queued: model, limit -> how many jobs of the model wait, and the work of the first of them by deadline
local function queued(keys, argv)
  local queue, late = queue_keys(keys[1], argv[1])
  local ids = redis.call('ZRANGE', late, 0, argv[2] - 1)
  local left = argv[2] - #ids
  if left > 0 then
    for _, id in ipairs(redis.call('ZRANGE', queue, 0, left - 1)) do ids[#ids + 1] = id end
  end
  return { redis.call('ZCARD', queue) + redis.call('ZCARD', late), work_of(keys[1], ids) }
end

-- queue_lengths -> model, jobs that wait, ... of every model that has any
local function queue_lengths(keys)
  return queued_by_model(keys[1])
end

-- take_webhooks: limit, lease_s, busy receiver, ... -> for each delivery its receiver, its lease, the job's fields and values
local function take_webhooks(keys, argv)
  local prefix, limit, moment, busy, taken = keys[1], tonumber(argv[1]), now(), {}, {}
  for i = 3, #argv do busy[argv[i]] = true end
  for _, receiver in ipairs(redis.call('ZRANGE', prefix .. ':outbox', '-inf', moment, 'BYSCORE', 'LIMIT', 0, limit + #argv - 2)) do
    if not busy[receiver] and #taken < limit then
      local own = prefix .. ':outbox:' .. receiver
      local id = redis.call('ZRANGE', own, 0, 0)[1]
      local record = redis.call('HGETALL', job_key(prefix, id))
      if #record == 0 then
        schedule_webhook(prefix, receiver, id, nil) -- its job is gone
      else
        schedule_webhook(prefix, receiver, id, moment + tonumber(argv[2]))
        taken[#taken + 1] = { receiver, redis.call('ZSCORE', own, id), record }
      end
    end
  end
  return taken
end

-- settle_webhook: id, lease, seconds until it is due again ('' for never), webhook -> 'ok' | 'lost'
-- The lease is the moment it ends at: where the delivery is due at another by now, somebody else has taken it.
local function settle_webhook(keys, argv)
  local prefix, id = keys[1], argv[1]
  local receiver = receiver_of(prefix, id)
  if not receiver or redis.call('ZSCORE', prefix .. ':outbox:' .. receiver, id) ~= argv[2] then return 'lost' end
  redis.call('HSET', job_key(prefix, id), 'webhook', argv[4])
  schedule_webhook(prefix, receiver, id, tonumber(argv[3]) and now() + tonumber(argv[3]))
  return 'ok'
end

redis.register_function('wan_VERSION_submit', submit)
redis.register_function('wan_VERSION_claim', claim)
redis.register_function('wan_VERSION_heartbeat', heartbeat)
redis.register_function('wan_VERSION_standings', standings)
redis.register_function('wan_VERSION_write', write)
redis.register_function('wan_VERSION_finish', finish)
redis.register_function('wan_VERSION_requeue', requeue)
redis.register_function('wan_VERSION_reap', reap)
redis.register_function('wan_VERSION_cancel', cancel)
redis.register_function('wan_VERSION_delete', delete)
redis.register_function('wan_VERSION_hold', hold)
redis.register_function('wan_VERSION_release', release)
redis.register_function('wan_VERSION_expired', expired)
redis.register_function('wan_VERSION_unsettled', unsettled)
redis.register_function('wan_VERSION_settle', settle)
redis.register_function('wan_VERSION_report_replica', report_replica)
redis.register_function('wan_VERSION_live_replicas', live_replicas)
redis.register_function('wan_VERSION_running', running)
redis.register_function('wan_VERSION_queued', queued)
redis.register_function('wan_VERSION_queue_lengths', queue_lengths)
redis.register_function('wan_VERSION_take_webhooks', take_webhooks)
redis.register_function('wan_VERSION_settle_webhook', settle_webhook)
