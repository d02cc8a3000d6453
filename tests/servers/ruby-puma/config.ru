run lambda { |env|
  [200, { 'Content-Type' => 'text/plain' }, ["pid=#{Process.pid} generation=#{ENV['REUSE_RUN_GENERATION']}\n"]]
}
