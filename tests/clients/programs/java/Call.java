import java.net.http.HttpRequest;
import java.net.http.HttpResponse;

class Call {
    public static void main(String[] arguments) throws Exception {
        String prompt = arguments[1].replace("\\", "\\\\").replace("\"", "\\\"");
        String body = "{\"model\": \"claude-haiku-4-5\", \"max_tokens\": 16000, \"messages\": [{\"role\": \"user\", \"content\": \"" + prompt + "\"}]}";
        var request = Gateway.messages().POST(HttpRequest.BodyPublishers.ofString(body)).build();
        var answer = Gateway.CLIENT.send(request, HttpResponse.BodyHandlers.ofString());
        if (answer.statusCode() != 200) {
            System.err.println(answer.body());
            System.exit(1);
        }
        System.out.println(answer.body());
    }
}
